"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the vocabulary, for harnesses that must count tokens as we do."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Depends, Response

from server.api.operations import Router
from server.api.requests import check_model
from server.errors import BadRequest
from server.parsing import json_body
from server.schemas.tokenize import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfo,
)
from server.services import ServicesOf
from server.streaming import json_response

router = Router()


@router.operation("POST", "/tokenize", body=TokenizeRequest, reply=TokenizeReply, errors=[404])
async def tokenize(
    body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))], services: ServicesOf
) -> Response:
    """Return the tokens of a text, in which the end-of-text token may be written by its name."""
    check_model(body.model, services)
    token_ids = await asyncio.to_thread(services.tokenizer.encode_special, body.prompt)
    names = [services.tokenizer.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
    return json_response(TokenizeReply(count=len(token_ids), tokens=token_ids, token_strs=names))


@router.operation("POST", "/detokenize", body=DetokenizeRequest, reply=DetokenizeReply, errors=[404])
async def detokenize(
    body: Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))], services: ServicesOf
) -> Response:
    """Return the text of tokens."""
    check_model(body.model, services)
    vocab_size = services.tokenizer.vocab_size
    if body.tokens and not (min(body.tokens) >= 0 and max(body.tokens) < vocab_size):
        raise BadRequest(f"tokens: ids must lie in [0, {vocab_size}).", "tokens")
    return json_response(DetokenizeReply(services.tokenizer.decode(body.tokens)))


@router.operation("GET", "/tokenizer_info", reply=TokenizerInfo)
async def tokenizer_info(services: ServicesOf) -> Response:
    """Describe the vocabulary."""
    tokenizer = services.tokenizer
    return json_response(
        TokenizerInfo(tokenizer_class=tokenizer.name, vocab_size=tokenizer.vocab_size, eos_token=tokenizer.eos_token)
    )
