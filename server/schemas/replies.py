"""Parts that replies share."""

from __future__ import annotations

import msgspec

from server.conversations.history import name_of
from server.conversations.open_turn import TurnReceipt


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, how many cost nothing because their state was there."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request. A conversation's history counts as prompt, and as cached where its state was reused."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, num_prompt_tokens: int, num_output_tokens: int, receipt: TurnReceipt | None) -> Usage:
        """Count a request's tokens, and those of the history its turn continued."""
        num_history = receipt.num_history_tokens if receipt is not None else 0
        num_cached = receipt.num_cached_tokens if receipt is not None else 0
        num_prompt = num_history + num_prompt_tokens
        return cls(num_prompt, num_output_tokens, num_prompt + num_output_tokens, PromptTokensDetails(num_cached))


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
