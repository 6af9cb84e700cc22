"""How often Python looks for garbage in cycles, in a process that makes thousands of objects a step."""

from __future__ import annotations

import gc

# A report of 64 tokens is some 200 objects, all of them free again a moment later without any help. At the default of
# 700 the collector looks through them at every third report, a quarter of what a server does for a token.
_YOUNG_OBJECTS = 50_000


def settle() -> None:
    """Leave what exists now alone for good, and look at what is made from now on, but seldom."""
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 10, 10)
    gc.enable()
