"""Bodies of `/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM spells them."""

from __future__ import annotations

import msgspec
from pydantic import Field

from server.schemas.generation import MAX_PROMPT_CHARS
from server.schemas.strict import StrictModel


class TokenizeRequest(StrictModel):
    """Which tokens a text is."""

    model: str | None = None
    prompt: str = Field(max_length=MAX_PROMPT_CHARS)
    add_special_tokens: bool = True  # accepted: our vocabularies add none of their own accord
    return_token_strs: bool = False


class TokenizeReply(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of a text."""

    count: int
    max_model_len: int | None = None  # a recurrent model has no window
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(StrictModel):
    """Which text tokens are."""

    model: str | None = None
    tokens: list[int] = Field(max_length=MAX_PROMPT_CHARS)


class DetokenizeReply(msgspec.Struct, frozen=True):
    """The text of tokens; bytes that are not UTF-8 become U+FFFD."""

    prompt: str


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What evaluation harnesses ask before they tokenize."""

    tokenizer_class: str
    vocab_size: int
    eos_token: str
    bos_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None
