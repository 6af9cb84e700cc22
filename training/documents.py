"""Documents of every accepted form, and what of them is learnt.

Chats are written in the World template: `User: ...`, a blank line, `Assistant: ...`, a blank line. What ends an answer
is learnt with it.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from training.config import SourceSection
from training.dialogues import Level, Message, dialogue, story_dialogue

BORDER = "\n\n"
DOCUMENT_CHARS = 1 << 14  # of a plain text, which has no borders of its own


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a document that is encoded by itself, and the weight of its tokens in the loss."""

    text: str
    weight: float


Document = list[Piece]


class _Record(msgspec.Struct):
    text: str | None = None
    messages: list[Message] | None = None


def read_documents(source: SourceSection, data_dir: Path, seed: int) -> Iterator[Document]:
    """Yield a source's documents, in their order in the file or of their making."""
    match source.made:
        case "short" | "medium" | "long" | "strange":
            level: Level = source.made
            for index in range(source.num_documents):
                yield chat(dialogue(level, seed, index), source.user_loss)
        case "stories":
            for index, record in enumerate(_records(data_dir / source.path)):
                if record.text:
                    yield chat(story_dialogue(record.text.strip(), seed, index), source.user_loss)
        case _:
            for record in _records(data_dir / source.path):
                if record.messages:
                    yield chat(record.messages, source.user_loss)
                elif record.text and record.text.strip():
                    yield [Piece(record.text.strip(), 1.0)]


def chat(messages: Iterable[Message], user_loss: float) -> Document:
    """A dialogue in the World template. What ends an answer is learnt with it."""
    pieces: Document = []
    after_answer = False
    for message in messages:
        content = clean(message["content"])
        border = [Piece(BORDER, 1.0 if after_answer else user_loss)] if pieces else []
        if message["role"] == "assistant":
            pieces += [*border, Piece("Assistant:", 0.0), Piece(" " + content, 1.0)]
            after_answer = True
        else:
            header = "System" if message["role"] == "system" else "User"
            pieces += [*border, Piece(header + ":", 1.0 if after_answer else 0.0), Piece(" " + content, user_loss)]
            after_answer = False
    return pieces


def clean(content: str) -> str:
    """The content without blank lines, which would end its turn."""
    return re.sub(r"\n{2,}", "\n", content.replace("\r\n", "\n")).strip()


def _records(path: Path) -> Iterator[_Record]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if ".jsonl" in path.suffixes:
        for line in data.splitlines():
            yield msgspec.json.decode(line, type=_Record)
    else:
        for text in cut_text(data.decode(), DOCUMENT_CHARS):
            yield _Record(text=text)


def cut_text(text: str, num_chars: int) -> Iterator[str]:
    """Cut a long text at blank lines into pieces of at least `num_chars`, so that some can be held out."""
    begin = 0
    while (end := text.find(BORDER, begin + num_chars)) >= 0:
        yield text[begin:end]
        begin = end + len(BORDER)
    yield text[begin:]
