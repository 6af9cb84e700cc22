"""The templates that are known, as data. `docs/templates.md` says where each comes from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from server.templates.template import Opening, Template

# What a model writes after an opening that stops short of its `>`, before anything worth showing. The `>` is left to
# the model because it shares tokens with what follows.
_CLOSE_TAG = r">?\s*"

_CLASSIC_HEADERS = {"system": "System: ", "developer": "System: ", "user": "User: "}
# The longer of two stops that end together must count, or a newline of the border would stay in the answer.
_CLASSIC_STOPS = ("\n\nUser:", "\nUser:", "\n\nSystem:")

_WORLD_OPENING = Opening("Assistant:", unshown=" ?")

WORLD = Template(
    name="world",
    headers=_CLASSIC_HEADERS,
    border="\n\n",
    past_opening="Assistant:",
    lead=" ",
    openings={None: _WORLD_OPENING, "none": _WORLD_OPENING},
    stop_strings=_CLASSIC_STOPS,
)


def _g1_thinking(hint: str = "") -> Opening:
    return Opening("Assistant: <think", thinking=True, unshown=_CLOSE_TAG, hint=hint)


G1 = Template(
    name="g1",
    headers=_CLASSIC_HEADERS,
    border="\n\n",
    past_opening="Assistant:",
    lead=" ",
    openings={
        None: _g1_thinking(),
        "none": Opening("Assistant: <think></think", unshown=_CLOSE_TAG),
        "minimal": _g1_thinking(" (think a bit)"),
        "low": _g1_thinking(" (think a bit)"),
        "medium": _g1_thinking(" (think)"),
        "high": _g1_thinking(" (think a lot)"),
        "xhigh": _g1_thinking(" (think a lot)"),
    },
    stop_strings=_CLASSIC_STOPS,
)

_G1H_THINKING = Opening("Bot✿<think", thinking=True, unshown=_CLOSE_TAG)

G1H = Template(
    name="g1h",
    headers={"system": "System✿", "developer": "System✿", "user": "User✿"},
    border="✿\n",
    past_opening="Bot✿",
    lead="",
    openings={
        None: _G1H_THINKING,
        "none": Opening("Bot✿<think></think", unshown=_CLOSE_TAG),
        **dict.fromkeys(("minimal", "low", "medium", "high", "xhigh"), _G1H_THINKING),
    },
    stop_strings=("✿",),
    reserved="✿",
)

RAW = Template(
    name="raw",
    headers=dict.fromkeys(_CLASSIC_HEADERS, ""),
    border="",
    past_opening="",
    lead="",
    openings={None: Opening(""), "none": Opening("")},
    stop_strings=(),
    verbatim=True,
)

BUILTIN: Mapping[str, Template] = MappingProxyType({template.name: template for template in (WORLD, G1, G1H, RAW)})
