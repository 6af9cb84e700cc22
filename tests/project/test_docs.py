"""What the documents say is what the code does, where a test can tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_type_hints

import pytest
from openai.types import completion_create_params as text
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from server.errors import ANSWERS
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.generation import GenerationFields
from server.schemas.responses import ResponseRequest
from server.schemas.strict import StrictModel
from tests.conftest import ROOT

API = (ROOT / "docs/api.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "kernels/README.md"]


@pytest.mark.parametrize("code", sorted({rule.code for rule in ANSWERS.values()}))
def test_every_error_code_is_documented(code: str) -> None:
    """A client can look up each code it may meet."""
    assert f"`{code}`" in API


@pytest.mark.parametrize("schema", [ChatRequest, CompletionRequest])
def test_every_field_is_documented(schema: type[GenerationFields]) -> None:
    """Each field of a request is listed, with what it does or why it does nothing."""
    named = set(re.findall(r"[a-z_]+", API))
    assert set(schema.model_fields) | set(schema.without_effect) | set(schema.neutral_values) <= named | {
        "prompt",
        "messages",
    }


def openai_fields(*forms: type) -> set[str]:
    """Return every field that OpenAI's client can send, with a stream or without."""
    return {name for form in forms for name in get_type_hints(form)}


OPENAI_CHAT = openai_fields(chat.CompletionCreateParamsNonStreaming, chat.CompletionCreateParamsStreaming)
OPENAI_COMPLETIONS = openai_fields(text.CompletionCreateParamsNonStreaming, text.CompletionCreateParamsStreaming)
OPENAI_RESPONSES = openai_fields(responses.ResponseCreateParamsNonStreaming, responses.ResponseCreateParamsStreaming)


@pytest.mark.parametrize(
    ("schema", "fields", "column"),
    [(ChatRequest, OPENAI_CHAT, 1), (CompletionRequest, OPENAI_COMPLETIONS, 2), (ResponseRequest, OPENAI_RESPONSES, 3)],
    ids=["chat", "completions", "responses"],
)
def test_every_field_of_openais_is_told_apart(schema: type[StrictModel], fields: set[str], column: int) -> None:
    """The table says of each field that the newest client can send what becomes of it, and says what is so."""
    lines = [line.strip("|").split("|") for line in API.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line] for line in lines]
    told = {row[0].strip("`"): row[column] for row in rows if len(row) == 5 and row[column]}
    assert fields | set(schema.without_effect) | set(schema.neutral_values) == told.keys()
    become = {
        "supported": set(schema.model_fields),
        "no effect": set(schema.without_effect) - set(schema.model_fields),
        "refused": set(schema.neutral_values),
    }
    for name, becomes in told.items():
        assert name in become[becomes], f"{name} is not {becomes}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link of every document names a file of the project."""
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
