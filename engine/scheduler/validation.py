"""Requests that no engine could run, found before they cost anything. The server checks what users send; this is the
engine's own last line: nothing that passes here can break a step for the others in its batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import inf, isfinite

from engine.errors import InvalidRequest
from engine.messages import GenerationRequest, Grammar, SamplingParams, StateSource, StopRules
from engine.token_chain import DIGEST_BYTES, extend_digest

MAX_STOP_STRING_BYTES = 65_536  # of all stop strings of a request together: its automaton has a node a byte

MAX_GRAMMAR_BYTES = {"json_schema": 65_536, "json_object": 0, "regex": 65_536, "lark": 65_536}


def validate(request: GenerationRequest, vocab_size: int, max_logprobs: int) -> None:
    """Raise `InvalidRequest`, naming the field, if `request` asks for something impossible."""
    _require(len(request.prompt_ids) > 0, "prompt_ids", "is empty: a state has no next token without a last one")
    _require_ids(request.prompt_ids, "prompt_ids", vocab_size)
    _require_num_logprobs(request.num_prompt_logprobs, "num_prompt_logprobs", max_logprobs)
    _validate_source(request.source, vocab_size)
    _validate_borders(request)
    _validate_sampling(request.sampling, vocab_size, max_logprobs)
    _validate_stop(request.stop, vocab_size)
    _require_ids(request.counted_ids, "counted_ids", vocab_size)


def _validate_source(source: StateSource, vocab_size: int) -> None:
    _require(source.num_tokens >= 0, "source", "has a negative number of tokens")
    _require(len(source.chain) == DIGEST_BYTES, "source", f"has a chain that is not {DIGEST_BYTES} bytes long")
    _require_ids(source.replay_ids, "source", vocab_size)
    checkpoint = source.checkpoint
    if checkpoint is not None:
        num_tokens = checkpoint.num_tokens + len(source.replay_ids)
        # Replaying these tokens could never give the state that is asked for.
        fits = num_tokens == source.num_tokens and source.chain == extend_digest(checkpoint.chain, source.replay_ids)
        _require(fits, "source", "has replay_ids that do not lead from its checkpoint to its chain")
    elif source.replay_ids:
        whole = len(source.replay_ids) == source.num_tokens
        _require(whole, "source", "has replay_ids that are not the whole history, and no checkpoint")


def _validate_borders(request: GenerationRequest) -> None:
    borders = request.borders
    _require(not borders or request.source.num_tokens == 0, "borders", "is only for the empty history")
    edges = [0, *borders, len(request.prompt_ids)]
    ascending = all(before < after for before, after in pairwise(edges))
    _require(not borders or ascending, "borders", "is not ascending, or not inside the prompt")


def _validate_sampling(sampling: SamplingParams, vocab_size: int, max_logprobs: int) -> None:
    _require(0 <= sampling.seed < 2**64, "seed", "is not in [0, 2**64)")
    _require(0 <= sampling.temperature < inf, "temperature", "is not a finite number >= 0")
    _require(0 < sampling.top_p <= 1, "top_p", "is not in (0, 1]")
    _require(sampling.top_k >= 0, "top_k", "is negative")
    _require(0 <= sampling.min_p <= 1, "min_p", "is not in [0, 1]")
    _require(0 < sampling.typical_p <= 1, "typical_p", "is not in (0, 1]")
    _require(0 <= sampling.top_n_sigma < inf, "top_n_sigma", "is not a finite number >= 0")
    _require(isfinite(sampling.presence_penalty), "presence_penalty", "is not finite")
    _require(isfinite(sampling.frequency_penalty), "frequency_penalty", "is not finite")
    _require(0 < sampling.repetition_penalty < inf, "repetition_penalty", "is not a finite number > 0")
    _require(0 < sampling.penalty_decay <= 1, "penalty_decay", "is not in (0, 1]")
    _require_ids(sampling.logit_bias, "logit_bias", vocab_size)
    _require(all(map(isfinite, sampling.logit_bias.values())), "logit_bias", "has a bias that is not finite")
    _require_num_logprobs(sampling.num_logprobs, "num_logprobs", max_logprobs)
    if sampling.grammar is not None:
        _validate_grammar(sampling.grammar)


def _validate_grammar(grammar: Grammar) -> None:
    limit = MAX_GRAMMAR_BYTES[grammar.kind]
    _require(len(grammar.text.encode(errors="surrogatepass")) <= limit, "grammar", f"is longer than {limit} bytes")


def _validate_stop(stop: StopRules, vocab_size: int) -> None:
    _require(stop.max_tokens >= 0, "max_tokens", "is negative")
    _require(0 <= stop.min_tokens <= stop.max_tokens, "min_tokens", "is not in [0, max_tokens]")
    _require_ids(stop.stop_token_ids, "stop_token_ids", vocab_size)
    _require(all(stop.stop_strings), "stop_strings", "has an empty string")
    num_bytes = sum(map(len, stop.stop_strings))
    _require(num_bytes <= MAX_STOP_STRING_BYTES, "stop_strings", f"is longer than {MAX_STOP_STRING_BYTES} bytes")


def _require_ids(token_ids: Iterable[int], field: str, vocab_size: int) -> None:
    in_range = all(0 <= token_id < vocab_size for token_id in token_ids)
    _require(in_range, field, f"has a token id outside [0, {vocab_size})")


def _require_num_logprobs(num_logprobs: int | None, field: str, max_logprobs: int) -> None:
    _require(0 <= (num_logprobs or 0) <= max_logprobs, field, f"is not in [0, {max_logprobs}]")


def _require(condition: bool, field: str, complaint: str) -> None:
    if not condition:
        raise InvalidRequest(field, f"{field} {complaint}")
