"""Which implementation of the operators a test runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kernels import cpu

IMPLEMENTATIONS = ("compiled", "pytorch")


@contextmanager
def running_on(implementation: str) -> Iterator[None]:
    """Within the block, weights are packed and operators run by one of `IMPLEMENTATIONS`; skips what is not there."""
    if implementation == "pytorch":
        with cpu.eager():
            yield
    elif cpu.register(num_threads=2) is None:
        pytest.skip("no C++ compiler: the compiled operators need one")
    else:
        yield
