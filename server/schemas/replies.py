"""Parts that replies share."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from server.conversations.history import name_of
from server.conversations.open_turn import TurnReceipt


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Tokens of prompts, without history."""

    num_tokens: int
    num_cached: int  # not computed: a state had consumed them
    num_kept: int  # computed, and a state that has consumed them is kept


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens: those that a kept state had consumed, and those that one kept now has."""

    cached_tokens: int
    cache_write_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """Of the generated tokens: those that were thought."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request. A conversation's history counts as prompt, and as cached where its state was reused."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET  # of a chat

    @classmethod
    def of(
        cls, prompts: PromptTokens, num_output_tokens: int, receipt: TurnReceipt | None, num_thought: int | None = None
    ) -> Usage:
        """Count a request's tokens, and those of the history its turn continued."""
        num_prompt, num_cached, num_kept = prompts.num_tokens, prompts.num_cached, prompts.num_kept
        if receipt is not None:
            num_prompt += receipt.num_history_tokens
            num_cached += receipt.num_cached_tokens
            num_kept += receipt.num_replayed_tokens
        return cls(
            num_prompt,
            num_output_tokens,
            num_prompt + num_output_tokens,
            PromptTokensDetails(num_cached, num_kept),
            msgspec.UNSET if num_thought is None else CompletionTokensDetails(num_thought),
        )


class ConversationInfo(msgspec.Struct, frozen=True):
    """Where a committed turn left its conversation."""

    id: str
    version: int
    parent_version: int
    resume: str  # new | hot | restored | replayed
    durability: str  # memory | acked | fsynced

    @classmethod
    def of(cls, receipt: TurnReceipt) -> ConversationInfo:
        """Say what the receipt says."""
        return cls(
            id=name_of(receipt.conversation_id),
            version=receipt.version,
            parent_version=receipt.parent_version,
            resume=receipt.resume.value,
            durability=receipt.durability.value,
        )
