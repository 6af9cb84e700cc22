"""The templates that are known, as data. `docs/templates.md` says where each comes from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from server.templates.template import Effort, Opening, Template, ToolForm

THINKING_EFFORTS: tuple[Effort, ...] = ("minimal", "low", "medium", "high", "xhigh")

# -- User and Assistant -----------------------------------------------------------------------------------------------

# The longer of two stops that end together must count, or a newline of the border would stay in the answer.
_CLASSIC_STOPS = ("\n\nUser:", "\nUser:", "\n\nSystem:")

_WORLD_OPENING = Opening("Assistant:", completion=" ")

WORLD = Template(
    name="world",
    system="System: ",
    user="User: ",
    border="\n\n",
    past_opening="Assistant:",
    lead=" ",
    opening=_WORLD_OPENING,
    efforts={"none": _WORLD_OPENING},
    stop_strings=_CLASSIC_STOPS,
    tools=ToolForm(Opening("Assistant: ```json\n")),
)

# Before G1 an answer was one paragraph.
WORLD_V4 = msgspec.structs.replace(WORLD, name="world-v4", stop_strings=("\n\n", "\nUser:"), tools=None)


def _thinking(text: str, hint: str = "") -> Opening:
    """Open a thought, but for the `>` of its tag, which shares tokens with what follows and is left to the model."""
    return Opening(text + "<think", thinking=True, completion=">", skips_space=True, hint=hint)


def _not_thinking(text: str) -> Opening:
    """Open an answer after an empty thought."""
    return Opening(text + "<think></think", completion=">", skips_space=True)


G1 = msgspec.structs.replace(
    WORLD,
    name="g1",
    opening=_thinking("Assistant: "),
    efforts={
        "none": _not_thinking("Assistant: "),
        "minimal": _thinking("Assistant: ", " (think a bit)"),
        "low": _thinking("Assistant: ", " (think a bit)"),
        "medium": _thinking("Assistant: ", " (think)"),
        "high": _thinking("Assistant: ", " (think a lot)"),
        "xhigh": _thinking("Assistant: ", " (think a lot)"),
    },
)

# -- the flower -------------------------------------------------------------------------------------------------------

G1H = Template(
    name="g1h",
    system="System✿",
    user="User✿",
    border="✿\n",
    past_opening="Bot✿",
    opening=_thinking("Bot✿"),
    efforts={"none": _not_thinking("Bot✿"), **dict.fromkeys(THINKING_EFFORTS, _thinking("Bot✿"))},
    stop_strings=("✿",),
    reserved="✿",
    tools=ToolForm(Opening("Bot✿```json\n")),
)

# -- before World, and without a chat ---------------------------------------------------------------------------------

_RAVEN_OPENING = Opening("Alice:", completion=" ")

RAVEN = Template(
    name="raven",
    system="",
    user="Bob: ",
    border="\n\n",
    past_opening="Alice:",
    lead=" ",
    opening=_RAVEN_OPENING,
    efforts={"none": _RAVEN_OPENING},
    stop_strings=("\n\n", "\nBob:"),
)

_RESPONSE_OPENING = Opening("Response:", completion=" ")

INSTRUCTION = Template(
    name="instruction",
    system="Instruction: ",
    user="Instruction: ",
    user_after_system="Input: ",
    border="\n\n",
    past_opening="Response:",
    lead=" ",
    opening=_RESPONSE_OPENING,
    efforts={"none": _RESPONSE_OPENING},
    stop_strings=("\n\nInstruction:", "\nInstruction:", "\n\nInput:"),
)

RAW = Template(
    name="raw",
    system="",
    user="",
    border="",
    past_opening="",
    opening=Opening(""),
    efforts={"none": Opening("")},
    stop_strings=(),
    verbatim=True,
)

BUILTIN: Mapping[str, Template] = MappingProxyType(
    {template.name: template for template in (WORLD, WORLD_V4, G1, G1H, RAVEN, INSTRUCTION, RAW)}
)
