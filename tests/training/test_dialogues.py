from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from engine.tokenizer.loading import load as load_tokenizer
from training.dialogues import Level, dialogue, recall_probe, story_dialogue
from training.evaluate import encode_prompt, names
from training.facts import lexicon, values

LEVELS: tuple[Level, ...] = ("short", "medium", "long", "strange")


def test_dialogues_are_what_they_were() -> None:
    """The dialogues that a published model was trained on can be made again, to the letter."""
    digest = hashlib.sha256()
    for level in LEVELS[:3]:
        for index in range(200):
            digest.update(json.dumps(dialogue(level, 7, index)).encode())
    assert digest.hexdigest()[:8] == "a35c4ac7"


@pytest.mark.parametrize("level", LEVELS)
def test_turns_alternate(level: Level) -> None:
    """User and assistant take turns, the user begins, the assistant ends, and nobody says nothing."""
    for index in range(100):
        messages = dialogue(level, 1, index)
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)
        assert not any("{" in message["content"] for message in messages)


def test_held_out_values_are_never_told() -> None:
    """No training dialogue tells a held-out name, pet's name or city, not as an invented name either."""
    lists = ("names", "pet_names", "cities")
    unseen = {value for name in lists for value in values(name, "held out")}
    told = {value.capitalize() for name in lexicon().values for value in values(name, "training")}  # Blue is a color
    tables = {word for table in lexicon().tables.values() for word in table.values()}  # capitals are common knowledge
    text = " ".join(message["content"] for level in LEVELS for i in range(300) for message in dialogue(level, 2, i))
    words = set("".join(character if character.isalnum() else " " for character in text).split())
    assert not (unseen - told - tables) & words


@pytest.mark.parametrize("distance", [1, 3, 15])
def test_probes_tell_what_they_ask_for(distance: int) -> None:
    """The value asked for is held out and was told by the user, `distance` turns before or a little more."""
    for index in range(30):
        probe = recall_probe(distance, seed=1, index=index)
        assert probe.expected in values(probe.subject, "held out")
        told = [
            turn
            for turn, message in enumerate(probe.messages[:-1])
            if message["role"] == "user" and names(message["content"], probe.expected)
        ]
        turns_back = (len(probe.messages) - 1 - told[-1]) // 2
        assert distance <= turns_back <= distance + 2
        assert not names(probe.messages[-1]["content"], probe.expected)


def test_a_value_counts_only_as_whole_words() -> None:
    """`Rex` is named by `Rex.` and `rex`, not by `Rexford`."""
    assert names("Your dog's name is Rex.", "Rex")
    assert names("it is rex", "Rex")
    assert names("You like ice cream!", "ice cream")
    assert not names("Your name is Rexford.", "Rex")


def test_stories_are_asked_for_or_continued() -> None:
    """The answer is the story, or what comes after the beginning that the user gave."""
    story = "Once there was a dog. It ran. It slept. The end."
    kinds = set()
    for index in range(40):
        user, assistant = story_dialogue(story, 1, index)
        whole = assistant["content"] == story
        kinds.add(whole)
        assert whole or (story.endswith(assistant["content"]) and "Once there was a dog" in user["content"])
    assert kinds == {True, False}


def test_prompts_end_where_the_answer_begins(prepared: Path) -> None:
    """A dialogue that waits for an answer is encoded as the server encodes it."""
    tokenizer = load_tokenizer("auto", prepared, 300)
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "User: Hi\n\nAssistant:"
