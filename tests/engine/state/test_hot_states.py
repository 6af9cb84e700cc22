from collections import OrderedDict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.messages import StateSource
from engine.state.hot_states import HotStates
from engine.state.spec import RecurrentState
from tests.engine.stub_runner import STUB_SPEC, state_of

SIZE = STUB_SPEC.num_bytes


def state(name: int) -> RecurrentState:
    """Return one of the states there are."""
    return state_of([name], bytes([name]) * 16)


def source(name: int, num_tokens: int = 1) -> StateSource:
    """Return the source that names a state."""
    return StateSource(num_tokens=num_tokens, chain=bytes([name]) * 16)


def names_in(hot_states: HotStates, names: range = range(10)) -> list[int]:
    """Return which states are found, without looking in an order that matters to the caller."""
    return [name for name in names if hot_states.get(source(name)) is not None]


def test_the_state_used_least_recently_makes_room() -> None:
    """A look counts as a use."""
    hot_states = HotStates(3 * SIZE)
    for name in range(3):
        assert hot_states.put(state(name))
    hot_states.get(source(0))
    assert hot_states.put(state(3))
    assert names_in(hot_states) == [0, 2, 3]
    assert hot_states.num_evicted == 1


def test_a_state_is_found_by_all_of_its_name() -> None:
    """The number of tokens must be right as well as the chain."""
    hot_states = HotStates(SIZE)
    hot_states.put(state(1))
    assert hot_states.get(source(1, num_tokens=2)) is None
    assert hot_states.get(source(2)) is None


def test_a_pinned_state_is_never_evicted() -> None:
    """When only pinned ones are left, the new state is dropped and counted."""
    hot_states = HotStates(2 * SIZE)
    hot_states.put(state(0))
    hot_states.put(state(1))
    hot_states.pin(state(0).chain)
    assert hot_states.put(state(2))
    hot_states.pin(state(2).chain)
    assert not hot_states.put(state(3))
    assert names_in(hot_states) == [0, 2]
    assert hot_states.num_dropped == 1
    hot_states.unpin(state(0).chain)
    assert hot_states.put(state(3))
    assert names_in(hot_states) == [2, 3]


def test_a_state_larger_than_everything_evicts_nobody() -> None:
    """What cannot fit does not cost others their place."""
    hot_states = HotStates(SIZE)
    hot_states.put(state(0))
    hot_states.pin(state(0).chain)
    hot_states.put(state(1))
    assert names_in(hot_states) == [0]
    assert hot_states.num_evicted == 0


def test_a_forgotten_state_is_not_found_while_it_is_still_being_written() -> None:
    """Its memory counts until then."""
    hot_states = HotStates(SIZE)
    hot_states.put(state(0))
    hot_states.pin(state(0).chain)
    hot_states.forget(state(0).chain)
    assert hot_states.get(source(0)) is None
    assert hot_states.num_bytes == SIZE
    hot_states.unpin(state(0).chain)
    assert hot_states.num_bytes == 0


def test_states_that_nobody_used_make_room_first() -> None:
    """A stream of prompts that come once leaves what somebody came back to."""
    hot_states = HotStates(4 * SIZE)
    for name in range(3):
        hot_states.put(state(name))
    assert names_in(hot_states) == [0, 1, 2]  # and with that they are used
    for name in range(3, 9):
        hot_states.put(state(name))
    assert names_in(hot_states) == [0, 1, 2, 8]
    assert hot_states.num_evicted == 5


def test_states_that_nobody_used_have_a_share_of_the_memory() -> None:
    """Up to it they may push out used ones, or nothing new could ever be used."""
    hot_states = HotStates(8 * SIZE)
    for name in range(8):
        hot_states.put(state(name))
    assert len(names_in(hot_states)) == 8
    for name in range(8, 16):
        hot_states.put(state(name))
    assert names_in(hot_states, range(16)) == [2, 3, 4, 5, 6, 7, 14, 15]


def test_to_look_whether_a_state_is_there_is_no_use() -> None:
    """`in` neither proves a state nor finds a forgotten one."""
    hot_states = HotStates(2 * SIZE)
    hot_states.put(state(0))
    hot_states.put(state(1))
    assert state(0).chain in hot_states
    hot_states.put(state(2))
    assert state(0).chain not in hot_states
    hot_states.pin(state(1).chain)
    hot_states.forget(state(1).chain)
    assert state(1).chain not in hot_states


def test_there_is_room_for_a_state_unless_pinned_ones_take_it() -> None:
    """What can be evicted is room."""
    hot_states = HotStates(2 * SIZE)
    for name in range(2):
        hot_states.put(state(name))
        assert hot_states.has_room(SIZE)
        hot_states.pin(state(name).chain)
        hot_states.pin(state(name).chain)
    assert not hot_states.has_room(SIZE)
    hot_states.unpin(state(0).chain)
    assert not hot_states.has_room(SIZE)
    hot_states.unpin(state(0).chain)
    assert hot_states.has_room(SIZE)
    assert not HotStates(SIZE - 1).has_room(SIZE)


class HotStatesMachine(RuleBasedStateMachine):
    """Against a plain model: names in order of use, those never used apart, pins counted."""

    def __init__(self) -> None:
        super().__init__()
        self.hot_states = HotStates(4 * SIZE)
        self.uses: OrderedDict[int, None] = OrderedDict()  # least recent first
        self.trial: set[int] = set()  # never used
        self.pins: dict[int, int] = {}
        self.forgotten: set[int] = set()

    @rule(name=st.integers(0, 7))
    def put(self, name: int) -> None:
        """Keep a state."""
        kept = self.hot_states.put(state(name))
        self.forgotten.discard(name)
        if name not in self.uses:
            if len(self.uses) == 4:
                victims = [other for other in self.uses if not self.pins.get(other)]
                assert kept == bool(victims)
                if not victims:
                    return
                victim = next((other for other in victims if other in self.trial), victims[0])  # one has its share
                del self.uses[victim]
                self.trial.discard(victim)
            self.trial.add(name)
        self.uses[name] = None
        self.uses.move_to_end(name)

    @rule(name=st.integers(0, 7))
    def get(self, name: int) -> None:
        """Use a state."""
        found = self.hot_states.get(source(name))
        assert (found is not None) == (name in self.uses and name not in self.forgotten)
        if found is not None:
            assert found.chain == state(name).chain
            self.uses.move_to_end(name)
            self.trial.discard(name)

    @rule(name=st.integers(0, 7))
    def pin(self, name: int) -> None:
        """Pin a state that is found."""
        if name in self.uses and name not in self.forgotten:
            self.hot_states.pin(state(name).chain)
            self.pins[name] = self.pins.get(name, 0) + 1

    @rule(name=st.integers(0, 7))
    def unpin(self, name: int) -> None:
        """Unpin a state that is pinned."""
        if self.pins.get(name):
            self.hot_states.unpin(state(name).chain)
            self.pins[name] -= 1
            if not self.pins[name] and name in self.forgotten:
                self.forgotten.discard(name)
                del self.uses[name]
                self.trial.discard(name)

    @rule(name=st.integers(0, 7))
    def forget(self, name: int) -> None:
        """Forget any state."""
        self.hot_states.forget(state(name).chain)
        if name in self.uses:
            if self.pins.get(name):
                self.forgotten.add(name)
            else:
                del self.uses[name]
                self.trial.discard(name)

    @invariant()
    def bytes_are_counted(self) -> None:
        """The budget is kept and the count is right."""
        assert self.hot_states.num_bytes == SIZE * len(self.uses) <= self.hot_states.max_bytes
        assert len(self.hot_states) == len(self.uses)


TestHotStates = HotStatesMachine.TestCase
TestHotStates.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
