"""What the documents say is what the code does, where a test can tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.errors import ANSWERS
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.generation import GenerationFields
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Every relative link of every document names a file of the project."""
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
