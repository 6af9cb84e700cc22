"""What every template renders, piece by piece, with the ids of the World vocabulary: `golden.json`, and how it is made.

`python -m tests.server.templates.golden` writes the file again. Read the difference: a changed id is a prompt that no
model was trained on, or was until now.
"""

from __future__ import annotations

import json
from pathlib import Path

from engine.tokenizer.world import WorldTokenizer
from server.templates import BUILTIN, Message, Template, Tool, Toolbox, ToolCall, render, tools_text

PATH = Path(__file__).with_name("golden.json")

SYSTEM = Message("system", "Be brief.")
HI = Message("user", "hi")
HELLO = Message("assistant", "Hello\n\nthere.")
TOOLBOX = Toolbox((Tool("now", "", {}),), must_call=True)
CALL = Message("assistant", "", ToolCall("now", "{}"))
RESULT = Message("tool", '{"time":"noon"}')

Golden = dict[str, list[tuple[str, list[int]]]]


def rendered(template: Template) -> Golden:
    """Return the pieces of a first turn, a later turn, a history, a first turn at every effort, and one with tools."""
    prompts = {
        "first": render([SYSTEM, HI], template, first=True),
        "later": render([HI], template, first=False),
        "history": render([SYSTEM, HI, HELLO, HI], template, first=True),
        **{effort: render([HI], template, first=True, reasoning_effort=effort) for effort in template.efforts},
    }
    if template.tools is not None:
        told = tools_text(TOOLBOX, template)
        prompts["tools"] = render([HI, CALL, RESULT], template, first=True, preamble=told, must_call=True)
    tokenizer = WorldTokenizer()
    return {
        f"{template.name} {case}": [(str(piece), tokenizer.encode(str(piece))) for piece in prompt.pieces]
        for case, prompt in prompts.items()
    }


def write() -> None:
    """Write the file, a case a line."""
    cases = {case: pieces for template in BUILTIN.values() for case, pieces in rendered(template).items()}
    lines = [f"{json.dumps(case)}: {json.dumps(pieces, ensure_ascii=False)}" for case, pieces in cases.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
