"""Prefix states: which prompts begin where others have been, and which states they leave there.

A prefix state is a hot state like any other, named by the chain of the prompt's first tokens. A request says where its
prompt may be cut (its *borders*: ends of messages, and the place before the last token, from which an equal prompt can
be sampled again). The policy, all of it here:

- A sequence begins at the longest border whose state is in memory. If there is none, the state store is asked for the
  borders that are kept, longest first. Only the state that is used counts as used.
- On its way it leaves a state at the first border (where a system prompt ends) and at the last three, unless that is
  shorter than `prefix_min_tokens` or its state is in memory already. So a prompt leaves at most four.
- The state store gets what is likely to be wanted elsewhere: the first border unless it ends the prompt, and whatever
  is used a second time; but nothing shorter than `prefix_store_min_tokens`.
- Whoever could begin at a border that a running sequence is about to reach waits for it: it is in no worse place than
  that sequence, and looks again in every step, so that one that ends early keeps nobody waiting.

Every look is counted, and every miss with its reason.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import CheckpointMissing, CheckpointRejected
from engine.messages import CheckpointRef, GenerationRequest, ResumeKind
from engine.scheduler.sequence import Border, Origin, Sequence
from engine.state.hot_states import HotStates
from engine.state.prefix_store import PrefixStore
from engine.state.spec import RecurrentState
from engine.token_chain import extend_digest

_log = logging.getLogger(__name__)

NUM_LAST_KEPT = 3  # borders, besides the first
MAX_REMEMBERED = 1 << 14  # borders of which is known whether they came before

LOOKUPS = "rwkv_prefix_lookups_total"
MISSES = "rwkv_prefix_misses_total"
TOKENS_REUSED = "rwkv_prefix_tokens_reused_total"


@dataclass(slots=True)
class _Past:
    """What happened at a border before."""

    was_kept: bool = False
    num_uses: int = 0
    is_stored: bool = False  # or being written


class Prefixes:
    """The prefix states of one engine. Engine thread only."""

    def __init__(self, config: EngineConfig, state_bytes: int, hot_states: HotStates, store: PrefixStore) -> None:
        self.counters: Counter[str] = Counter()
        self._min_tokens = config.prefix_min_tokens
        self._store_min_tokens = config.prefix_store_min_tokens
        self._state_bytes = state_bytes
        self._hot_states = hot_states
        self._store = store
        self._past: OrderedDict[bytes, _Past] = OrderedDict()  # by chain, the latest last

    # -- before the prompt --------------------------------------------------------------------------------------------

    def borders_of(self, request: GenerationRequest) -> list[Border]:
        """Return the borders of `request` with their names; costs about a microsecond a token."""
        borders = []
        chain, begin = request.source.chain, 0
        for end in request.borders:
            chain, begin = extend_digest(chain, request.prompt_ids[begin:end]), end
            borders.append(Border(end, chain))
        return borders

    def wanted(self, sequence: Sequence) -> list[Border]:
        """Return the borders at which the sequence is to leave a state, as far as is known before it begins."""
        return [
            border
            for border in self._lasting(sequence.borders)
            if border.chain not in self._hot_states and self._hot_states.has_room(self._state_bytes)
        ]

    def may_gain(self, sequence: Sequence, expected: set[bytes]) -> bool:
        """Say whether a state that is `expected` in memory would save the sequence more than what is there now."""
        if not _may_begin_later(sequence.request):
            return False
        for border in reversed(self._long(sequence.borders)):
            if border.chain in self._hot_states:
                return False
            if border.chain in expected:
                return True
        return False

    def find(self, sequence: Sequence) -> Origin | None:
        """Return where the sequence can begin without asking the store."""
        if not _may_begin_later(sequence.request):
            return None
        for border in reversed(self._long(sequence.borders)):
            if (state := self._hot_states.get(_ref(border))) is not None:
                return self._hit(state, "hit_memory")
        return None

    def ask_store(self, sequence: Sequence) -> Future[RecurrentState] | None:
        """Ask the store for a state to begin from, or say that it need not be asked."""
        asked = [border for border in self._lasting(sequence.borders) if border.num_tokens >= self._store_min_tokens]
        if not asked or not _may_begin_later(sequence.request) or self._store.rests:
            return None
        return self._store.fetch([(border.num_tokens, border.chain) for border in reversed(asked)])

    def found(self, future: Future[RecurrentState]) -> Origin | None:
        """Return where a sequence that asked the store begins; None if that did not help."""
        try:
            state = future.result()
        except CheckpointMissing:
            return None
        except CheckpointRejected:  # told and put away by who read it
            self.counters["rwkv_checkpoints_rejected_total"] += 1
            return None
        except Exception as error:
            _log.warning("a prefix state could not be fetched: %s", error)
            self.counters["rwkv_checkpoints_unavailable_total"] += 1
            self._store.rest()
            return None
        self.counters["rwkv_state_load_bytes_total"] += state.num_bytes
        past = self._remember(state.chain)
        past.was_kept = self._hot_states.put(state)
        past.is_stored = True
        return self._hit(state, "hit_store")

    def miss(self, sequence: Sequence) -> Origin:
        """Count why the sequence begins with nothing."""
        if sequence.borders:
            self.counters[f"{LOOKUPS}:miss"] += 1
            self.counters[f"{MISSES}:{self._reason(sequence)}"] += 1
            for border in sequence.borders:
                self._remember(border.chain)
        return Origin(ResumeKind.NEW)

    # -- on the way, and behind ---------------------------------------------------------------------------------------

    def keep(self, sequence: Sequence, state: RecurrentState) -> None:
        """Keep the state that the sequence left at a border."""
        past = self._remember(state.chain)
        past.was_kept = self._hot_states.put(state)
        if not past.was_kept:
            return
        sequence.num_kept = state.num_tokens
        is_first = state.num_tokens == self._lasting(sequence.borders)[0].num_tokens
        if is_first and state.num_tokens < len(sequence.request.prompt_ids) - 1:
            self._write(state, past)

    def forget(self, chain: bytes) -> None:
        """Remove what the store has behind `chain`."""
        self._past.pop(chain, None)
        self._store.delete(chain)

    def advance(self) -> None:
        """Take note of what the store has done."""
        for chain in self._store.advance():
            self._remember(chain).is_stored = False

    def _lasting(self, borders: SequenceOf[Border]) -> list[Border]:
        """Return the borders that are worth a state."""
        long = self._long(borders)
        return long if len(long) <= 1 + NUM_LAST_KEPT else [long[0], *long[-NUM_LAST_KEPT:]]

    def _long(self, borders: SequenceOf[Border]) -> list[Border]:
        return [border for border in borders if border.num_tokens >= self._min_tokens]

    def _hit(self, state: RecurrentState, outcome: str) -> Origin:
        self.counters[f"{LOOKUPS}:{outcome}"] += 1
        self.counters[TOKENS_REUSED] += state.num_tokens
        past = self._remember(state.chain)
        past.num_uses += 1
        if past.num_uses > 1:
            self._write(state, past)
        return Origin(ResumeKind.NEW, state, num_cached=state.num_tokens)

    def _write(self, state: RecurrentState, past: _Past) -> None:
        if state.num_tokens >= self._store_min_tokens and not past.is_stored:
            past.is_stored = self._store.write(state)

    def _reason(self, sequence: Sequence) -> str:
        if not _may_begin_later(sequence.request):
            return "prompt_logprobs"
        lasting = self._lasting(sequence.borders)
        if not lasting:
            return "too_short"
        if self._store.rests and lasting[-1].num_tokens >= self._store_min_tokens:
            return "store_unavailable"
        pasts = [past for border in sequence.borders if (past := self._past.get(border.chain)) is not None]
        if any(past.was_kept for past in pasts):
            return "evicted"
        return "not_kept" if pasts else "new"

    def _remember(self, chain: bytes) -> _Past:
        past = self._past.setdefault(chain, _Past())
        self._past.move_to_end(chain)
        if len(self._past) > MAX_REMEMBERED:
            self._past.popitem(last=False)
        return past


def _may_begin_later(request: GenerationRequest) -> bool:
    """Say whether nothing is wanted of the prompt's tokens but their state."""
    return request.num_prompt_logprobs is None


def _ref(border: Border) -> CheckpointRef:
    return CheckpointRef(checkpoint_id="", num_tokens=border.num_tokens, chain=border.chain)
