import select
import threading

from engine.doorbell import Doorbell


def is_ringing(doorbell: Doorbell, timeout_seconds: float = 0) -> bool:
    """Say whether whoever polls would wake."""
    return bool(select.select([doorbell.fileno()], [], [], timeout_seconds)[0])


def test_a_ring_wakes_the_thread_that_waits() -> None:
    """Rung from another thread, heard in this one."""
    doorbell = Doorbell()
    threading.Thread(target=doorbell.ring).start()
    assert is_ringing(doorbell, timeout_seconds=20)
    doorbell.close()


def test_it_rings_until_it_is_answered() -> None:
    """However often it was rung, one answer is enough; an answer without a ring is no matter."""
    doorbell = Doorbell()
    for _ in range(100_000):  # more than any buffer holds
        doorbell.ring()
    assert is_ringing(doorbell)
    doorbell.answer()
    assert not is_ringing(doorbell)
    doorbell.answer()
    doorbell.close()


def test_nobody_hears_a_bell_that_was_taken_down() -> None:
    """A thread that finishes late may ring all the same."""
    doorbell = Doorbell()
    doorbell.close()
    doorbell.ring()
