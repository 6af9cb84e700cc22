"""How a kernel overlaps with the one before it: programmatic dependent launch.

A kernel launched with `launch_pdl` begins before its predecessor is done: in a step once all of that one's programs
have begun (EARLY), in a prompt once all have ended, since those fill the card and what begins earlier is in their way.
What it reads before `wait_for_inputs` must therefore be older than its predecessor: weights, and states and indices
that were there before the first kernel of the model, which is launched without. What it reads afterwards may be
anything that came before. Launched without, both calls do nothing. NVIDIA, PTX ISA, "griddepcontrol".

Asking for weights before the wait takes copies into shared memory, which `hopper.py` has; into the card's cache alone
(`cp.async.bulk.prefetch.L2`) it was slower, the asking delays the reading.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


STEP: dict[str, Any] = {"launch_pdl": True, "EARLY": True}
PROMPT: dict[str, Any] = {"launch_pdl": True}


@triton.jit
def let_successor_begin(EARLY: tl.constexpr):
    """Allow the next kernel to begin with this one; else it begins when this one's programs have ended."""
    if EARLY and not INTERPRETED:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs():
    """Return when everything before this kernel is done and can be read."""
    if not INTERPRETED:
        gdc_wait()
