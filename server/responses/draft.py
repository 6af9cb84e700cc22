"""A response while it comes into being: what it echoes of its request, the ids of its items, and its final form."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.messages import FinishReason
from engine.tokenizer import Tokenizer
from server.api.replies import ThoughtCounter
from server.conversations.ledger import Item
from server.conversations.open_turn import TurnReceipt
from server.generation import Delivered, Outcome
from server.items import AnswerIds, answered
from server.responses.logprobs import output_logprobs
from server.schemas.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ReasoningReply,
    Response,
    ResponseFailure,
    ResponseRequest,
    ResponseUsage,
    StateInfo,
    TextReply,
)
from server.templates import AnswerReader, RenderedPrompt, read_answer


class Draft:
    """One response from its request to its end. The ids of its items are known before the items are."""

    def __init__(self, body: ResponseRequest, model: str, tokenizer: Tokenizer, response_id: str) -> None:
        self.response_id = response_id
        self.ids = AnswerIds()
        self.prompt: RenderedPrompt | None = None  # set when it is rendered
        self._tokenizer = tokenizer
        self._toolbox = body.toolbox
        self._begun = Response(
            id=self.response_id,
            created_at=int(time.time()),
            status="in_progress",
            background=body.background,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata,
            model=model,
            previous_response_id=body.previous_response_id,
            conversation=None if body.conversation is None else {"id": body.conversation.id},
            reasoning=ReasoningReply(effort=body.reasoning.effort),
            store=body.store,
            temperature=body.temperature,
            top_p=body.top_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            top_logprobs=body.top_logprobs or 0,
            text=TextReply(format=_text_format(body)),
            parallel_tool_calls=body.parallel_tool_calls,
            tools=[{**tool.model_dump(), "type": "function"} for tool in body.tools],
            tool_choice=_tool_choice(body),
            truncation=body.truncation,
        )

    def begun(self, status: str = "in_progress") -> Response:
        """Return it before there is an answer."""
        return msgspec.structs.replace(self._begun, status=status)

    def failed(self, code: str, message: str) -> Response:
        """Return it as one that will never have an answer."""
        failure = ResponseFailure(code=code, message=message)
        return msgspec.structs.replace(self._begun, status="failed", error=failure)

    def items(self, outcome: Outcome, answer_id: str = "") -> list[Item]:
        """Return the items of the whole answer."""
        assert self.prompt is not None, "an answer follows a prompt"
        return answered(
            read_answer(outcome.whole.text, self.prompt.opening, self._toolbox),
            answer_id,
            self.ids,
            logprobs=self._logprobs(outcome.whole),
            is_complete=outcome.finished.reason is not FinishReason.LENGTH,
        )

    def completed(self, items: Sequence[Item], outcome: Outcome) -> Response:
        """Return it with its answer: complete, or incomplete where it ran out of tokens."""
        is_complete = outcome.finished.reason is not FinishReason.LENGTH
        return msgspec.structs.replace(
            self._begun,
            status="completed" if is_complete else "incomplete",
            completed_at=int(time.time()) if is_complete else None,
            incomplete_details=None if is_complete else IncompleteDetails(reason="max_output_tokens"),
            output=[msgspec.Raw(item.body) for item in items],
            usage=self._usage(outcome),
            state=self._state(outcome.finished.receipt),
        )

    def _state(self, receipt: TurnReceipt | None) -> StateInfo | None:
        if receipt is None:
            return None
        is_kept = self._begun.store or self._begun.conversation is not None
        return StateInfo(
            resume=receipt.resume.value,
            durability=receipt.durability.value if is_kept else None,
            version=receipt.version if is_kept else None,
            parent_version=receipt.parent_version if is_kept else None,
        )

    def reader(self) -> AnswerReader:
        """Return what tells thought and answer apart."""
        assert self.prompt is not None, "an answer follows a prompt"
        return AnswerReader(self.prompt.opening, self._toolbox)

    def _usage(self, outcome: Outcome) -> ResponseUsage:
        whole, finished = outcome.whole, outcome.finished
        receipt = finished.receipt
        num_history = 0 if receipt is None else receipt.num_history_tokens
        cached = finished.num_cached_tokens + (0 if receipt is None else receipt.num_cached_tokens)
        num_input, num_output = num_history + len(outcome.prompted.prompt_ids), len(whole.token_ids)
        written = finished.num_kept_tokens if receipt is None else num_input - cached + num_output
        return ResponseUsage(
            input_tokens=num_input,
            input_tokens_details=InputTokensDetails(cached_tokens=cached, cache_write_tokens=written),
            output_tokens=num_output,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self._num_thought(whole)),
            total_tokens=num_input + num_output,
        )

    def _logprobs(self, whole: Delivered) -> list[dict[str, Any]]:
        """Return those of what was said; a thought has none."""
        if whole.logprobs is None:
            return []
        begin = self._num_thought(whole)
        return output_logprobs(self._tokenizer, whole.token_ids[begin:], whole.logprobs[begin:])

    def _num_thought(self, whole: Delivered) -> int:
        """Return how many tokens were thought: those up to the one that ends the thought."""
        assert self.prompt is not None, "an answer follows a prompt"
        if not self.prompt.opening.thinking:
            return 0
        counter = ThoughtCounter(self._tokenizer)
        counter.push(whole.token_ids)
        return counter.num_tokens


def _tool_choice(body: ResponseRequest) -> object:
    if body.tool_choice is None:
        return "auto"
    return body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump()


def _text_format(body: ResponseRequest) -> dict[str, object]:
    return body.text.format.model_dump(by_alias=True, exclude_none=True)
