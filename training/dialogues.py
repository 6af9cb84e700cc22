"""Dialogues made by rule: somebody tells things, talks about something else, and asks for them later.

They teach a small model what a server with memory is for. Everything is drawn from a seed: the same `(seed, index)`
gives the same dialogue for ever, in any process. One value in ten of every open list (names, pets' names, cities, ...)
is *held out*: training dialogues never tell it, so recall can be measured on facts that no weight has seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from training.facts import Fact, Half, Kind, held_out_words, lexicon, values

Message = dict[str, str]
Level = Literal["short", "medium", "long", "strange"]

_TURNS: dict[Level, tuple[int, int]] = {"short": (2, 6), "medium": (6, 12), "long": (11, 18), "strange": (3, 9)}
_GAPS: dict[Level, tuple[int, int]] = {"short": (0, 1), "medium": (1, 4), "long": (2, 14), "strange": (0, 3)}
_INVENTED = {"names": 0.25, "pet_names": 0.25}  # share of values that are in no list
_STRANGE = dict.fromkeys(("names", "pet_names", "cities", "colors", "foods", "words"), 0.8)


_OPENINGS = (
    "",
    "",
    "",
    "",
    "Hi! ",
    "Hello! ",
    "Hi, ",
    "Hello, ",
    "Hey, ",
    "By the way, ",
    "Just so you know, ",
    "Please remember that ",
)
_ASK_OPENINGS = ("", "", "", "", "", "And ", "So, ", "Now, ", "Okay, ", "Tell me, ", "Quick question: ", "By the way, ")
_NOTED = (
    "Okay, I will remember that.",
    "Thank you for telling me.",
    "Got it.",
    "I will remember that.",
    "Okay!",
    "That is good to know.",
    "Thanks, I will keep that in mind.",
)
_OPEN_LISTS = ("names", "pet_names", "cities", "foods", "words", "animals", "jobs", "hobbies", "colors")
_ONSETS = (
    "B",
    "D",
    "F",
    "G",
    "H",
    "J",
    "K",
    "L",
    "M",
    "N",
    "P",
    "R",
    "S",
    "T",
    "V",
    "W",
    "Z",
    "Br",
    "Ch",
    "Cl",
    "Dr",
    "Fr",
    "Gr",
    "Kr",
    "Sh",
    "St",
    "Th",
    "Tr",
)
_VOWELS = "aeiou"
_ENDINGS = ("", "", "n", "l", "r", "s", "x", "m", "t", "k")
_CORRECTIONS = (
    "Actually, {}.",
    "Sorry, {}.",
    "No, {}.",
    "I made a mistake. {}.",
    "Wait, {}.",
    "I changed my mind, {}.",
)


@dataclass(frozen=True, slots=True)
class RecallProbe:
    """A dialogue that ends with a question, and the value its answer must contain."""

    messages: list[Message]
    expected: str
    distance: int  # turns between the telling and the question
    subject: str  # what is asked for, in words


@dataclass(slots=True)
class _Talk:
    """A dialogue under way."""

    rng: random.Random
    half: Half
    invented: dict[str, float]  # share of invented values, by list
    messages: list[Message] = field(default_factory=list)
    facts: dict[tuple[str, str], Fact] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def say(self, user: str, assistant: str) -> None:
        self.messages += ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})

    @property
    def num_turns(self) -> int:
        return len(self.messages) // 2


def dialogue(level: Level, seed: int, index: int) -> list[Message]:
    """The training dialogue number `index` of a level: user and assistant in turn.

    Levels differ in length and in how far questions are from what they ask for; `strange` ones have many invented
    words, which can only be copied.
    """
    talk = _Talk(random.Random(f"{seed}/{level}/{index}"), "training", _STRANGE if level == "strange" else _INVENTED)
    rng = talk.rng
    num_turns = rng.randint(*_TURNS[level])
    if rng.random() < 0.3:
        _small_talk(talk)
    while talk.num_turns < num_turns:
        for _ in range(rng.choice((1, 1, 2, 3))):
            if len(talk.facts) < 7:
                _tell(talk, rng.choice((1, 1, 1, 2, 2, 3)))
        if rng.random() < 0.12:
            _correct(talk)
        for _ in range(rng.randint(*_GAPS[level])):
            _small_talk(talk)
        for _ in range(rng.choice((1, 2, 2, 3, 4))):
            _ask(talk)
    return talk.messages


def recall_probe(distance: int, seed: int, index: int, half: Half = "held out") -> RecallProbe:
    """Name, favorite colour and pet are told in one turn or three, then talk of other things, then one is asked for.

    `distance` counts the turns from the last telling to the question: 1 asks at once.
    """
    talk = _Talk(random.Random(f"{seed}/probe/{index}"), half, _INVENTED if half == "training" else {})
    rng = talk.rng
    facts = [_draw(talk, kind) for kind in lexicon().kinds[:3]]  # name, colour, pet
    if rng.random() < 0.5:
        _state(talk, facts)
    else:
        for fact in rng.sample(facts, 3):
            _state(talk, [fact])
    for _ in range(distance - 1):
        _small_talk(talk)
    wanted = facts[index % 3]
    question = _sentence(rng, wanted.fill(wanted.kind.asks[rng.choice((0, 0, 2, 3))]), "?")
    talk.messages.append({"role": "user", "content": question})
    return RecallProbe(talk.messages, wanted.value, distance, wanted.kind.values)


def story_dialogue(story: str, seed: int, index: int) -> list[Message]:
    """A user asks for a story, or begins one that the assistant continues."""
    rng = random.Random(f"{seed}/story/{index}")
    if rng.random() < 0.3:
        sentences = story.replace("\n", " ").split(". ")
        cut = rng.randint(1, 2)
        beginning, rest = ". ".join(sentences[:cut]), ". ".join(sentences[cut:])
        if rest:
            ask = rng.choice(("Continue this story: {}.", "How does this story go on? {}.", "{}. What happened next?"))
            return [{"role": "user", "content": ask.format(beginning)}, {"role": "assistant", "content": rest}]
    nouns = (word for name in ("animals", "pets", "words") for word in values(name))
    topics = [word for word in nouns if f" {word} " in story]
    asks = ["Tell me a story.", "Can you tell me a story?", "Please tell me a little story.", "I want to hear a story."]
    if topics and rng.random() < 0.7:
        topic = rng.choice(topics)
        asks = [
            f"Tell me a story about a {topic}.",
            f"Can you tell me a story about a {topic}?",
            f"I want a story with a {topic} in it.",
        ]
    return [{"role": "user", "content": rng.choice(asks)}, {"role": "assistant", "content": story}]


def _draw(talk: _Talk, kind: Kind) -> Fact:
    rng = talk.rng
    if kind.values == "ages":
        value = str(rng.randint(5, 90))
    elif kind.values == "numbers":
        value = str(rng.randint(0, 99))
    elif kind.values == "codes":
        value = "".join(rng.choice("0123456789") for _ in range(rng.choice((2, 3, 4, 4))))
    elif kind.values in talk.invented and rng.random() < talk.invented[kind.values]:
        strange = talk.invented is _STRANGE
        value = _spliced_word(rng) if strange and rng.random() < 0.7 else _invented_name(rng)
        if values(kind.values)[0].islower():
            value = value.lower()
    else:
        value = rng.choice(values(kind.values, talk.half))
    return Fact(kind, rng.choice(kind.subjects), value)


def _invented_name(rng: random.Random) -> str:
    """A name of two or three syllables, none of those held out: copying it cannot be learnt by heart."""
    while True:
        name = rng.choice(_ONSETS) + rng.choice(_VOWELS)
        for _ in range(rng.choice((1, 1, 2))):
            name += rng.choice("bdfgklmnprstvz") + rng.choice(_VOWELS)
        name += rng.choice(_ENDINGS)
        if name.lower() not in held_out_words():
            return name


def _spliced_word(rng: random.Random) -> str:
    """The beginning of one word of our lists and the end of another, so that pieces of all kinds are to be copied."""
    while True:
        first, second = (rng.choice(values(rng.choice(_OPEN_LISTS), "training")).split()[-1] for _ in range(2))
        word = (first[: rng.randint(1, len(first))] + second[rng.randint(0, len(second) - 1) :]).capitalize()
        if 3 <= len(word) <= 10 and word.lower() not in held_out_words():
            return word


def _tell(talk: _Talk, count: int) -> None:
    facts: list[Fact] = []
    kinds = lexicon().kinds
    for kind in talk.rng.choices(kinds, [kind.frequency for kind in kinds], k=count):
        fact = _draw(talk, kind)
        key = (kind.noun, fact.subject)
        if key not in talk.facts and all(
            (fact.kind.noun, fact.subject) != (other.kind.noun, other.subject) for other in facts
        ):
            facts.append(fact)
    if facts:
        _state(talk, facts)


def _state(talk: _Talk, facts: list[Fact]) -> None:
    """One turn in which the user tells these facts."""
    rng = talk.rng
    clauses = [fact.fill(rng.choice(fact.kind.clauses)) for fact in facts]
    for fact in facts:
        talk.facts[fact.kind.noun, fact.subject] = fact
    style = rng.random()
    if style < 0.4 or len(clauses) == 1:
        text = _join(clauses)
    elif style < 0.8:
        text = ". ".join([clauses[0], *(_capital(clause) for clause in clauses[1:])])
    else:
        text = ", ".join(clauses)
    user = _casing(rng, rng.choice(_OPENINGS) + text, ".")
    answers = [fact.fill(fact.kind.answer) for fact in facts]
    style = rng.random()
    if style < 0.3:
        reply = rng.choice(_NOTED)
    elif style < 0.6 and facts[0].kind.echoes:
        reply = " ".join(_capital(fact.fill(rng.choice(fact.kind.echoes))) for fact in facts[:2] if fact.kind.echoes)
    else:
        reply = rng.choice(("Okay, ", "Got it, ", "Okay, so ", "I see, ")) + _join(answers) + "."
    talk.say(user, reply)


def _correct(talk: _Talk) -> None:
    """The user changes something told earlier; the last word counts."""
    if not talk.facts:
        return
    rng = talk.rng
    old = rng.choice(list(talk.facts.values()))
    fact = Fact(old.kind, old.subject, _draw(talk, old.kind).value)
    talk.facts[fact.kind.noun, fact.subject] = fact
    clause = fact.fill(fact.kind.clauses[0])
    template = rng.choice(_CORRECTIONS)
    user = template.format(_capital(clause) if template.startswith("I made") else clause)
    talk.say(
        user,
        rng.choice(("Okay, {}.", "Got it, {} now.", "Thank you. Now I know that {}.")).format(
            fact.fill(fact.kind.answer)
        ),
    )


def _ask(talk: _Talk) -> None:
    rng = talk.rng
    style = rng.random()
    known = list(talk.facts.values())
    if style < 0.12 or not known:
        _ask_unknown(talk)
    elif style < 0.22 and len(known) >= 2:
        facts = rng.sample(known, 2)
        question = " and ".join(fact.fill(rng.choice(fact.kind.asks[:3])) for fact in facts)
        talk.say(_sentence(rng, question, "?"), _capital(_join([fact.fill(fact.kind.answer) for fact in facts])) + ".")
    elif style < 0.28:
        question = rng.choice(("what do you know about me", "what did I tell you", "what do you remember about me"))
        talk.say(
            _sentence(rng, question, "?"), _capital(_join([fact.fill(fact.kind.answer) for fact in known[:4]])) + "."
        )
    elif style < 0.34:
        _ask_yes_no(talk, rng.choice(known))
    else:
        fact = rng.choice(known)
        same_kind = [other for other in known if other.kind is fact.kind]
        if fact.kind.sole_asks and len(same_kind) == 1 and rng.random() < 0.25:
            question, answer = rng.choice(fact.kind.sole_asks), fact.kind.sole_answer
        else:
            question, answer = rng.choice(fact.kind.asks), fact.kind.answer
        talk.say(_sentence(rng, fact.fill(question), "?"), _capital(fact.fill(answer)) + ".")


def _ask_unknown(talk: _Talk) -> None:
    rng, kinds = talk.rng, lexicon().kinds
    kind = rng.choices(kinds, [kind.frequency for kind in kinds])[0]
    fact = _draw(talk, kind)
    if (kind.noun, fact.subject) in talk.facts or (kind.values == "names" and fact.subject == "friend"):
        return
    question = _sentence(rng, fact.fill(rng.choice(kind.asks)), "?")
    talk.say(
        question,
        fact.fill(rng.choice(("I don't know {}. You have not told me.", "I don't know {} yet.")).format(kind.noun)),
    )


def _ask_yes_no(talk: _Talk, fact: Fact) -> None:
    rng = talk.rng
    guess = fact if rng.random() < 0.5 else Fact(fact.kind, fact.subject, _draw(talk, fact.kind).value)
    verdict = "Yes" if guess.value == fact.value else "No"
    question = f"Is it true that {guess.fill(guess.kind.clauses[0])}?"
    talk.say(question, f"{verdict}, {fact.fill(fact.kind.answer)}.")


def _small_talk(talk: _Talk) -> None:
    """A turn about something else; none is repeated within a dialogue."""
    rng = talk.rng
    for _ in range(8):
        strange = talk.invented is _STRANGE and rng.random() < 0.4
        user, assistant = _repeat(rng, _strange_words(rng)) if strange else _exchange(rng)
        if user not in talk.used:
            break
    talk.used.add(user)
    talk.say(user, assistant)


def _exchange(rng: random.Random) -> tuple[str, str]:
    style = rng.random()
    if style < 0.62:
        user, assistant = rng.choice(lexicon().exchanges)
        return (user, assistant) if rng.random() < 0.8 else (_casing(rng, user, user[-1]), assistant)
    if style < 0.72:
        return _repeat(rng, " ".join(rng.choices(values("words"), k=rng.randint(1, 5))))
    if style < 0.79:
        return _sum(rng)
    if style < 0.83:
        start = rng.randint(1, 12)
        numbers = ", ".join(str(start + step) for step in range(5))
        return f"Count from {start} to {start + 4}.", numbers + "."
    return _lookup(rng)


def _repeat(rng: random.Random, phrase: str) -> tuple[str, str]:
    request = rng.choice(("Repeat after me: {}", "Say this: {}", "Please repeat: {}", "Say {}"))
    return request.format(phrase), _capital(phrase) + "."


def _strange_words(rng: random.Random) -> str:
    words = [_spliced_word(rng) for _ in range(rng.randint(1, 4))]
    return " ".join(words if rng.random() < 0.5 else map(str.lower, words))


def _sum(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.3 and left >= right:
        return f"What is {left} minus {right}?", f"{left} minus {right} is {left - right}."
    return rng.choice(
        (f"What is {left} plus {right}?", f"How much is {left} plus {right}?")
    ), f"{left} plus {right} is {left + right}."


def _lookup(rng: random.Random) -> tuple[str, str]:
    name, question, answer = rng.choice(
        (
            ("capitals", "What is the capital of {}?", "The capital of {} is {}."),
            ("opposites", "What is the opposite of {}?", "The opposite of {} is {}."),
            ("sounds", "What does a {} say?", "A {} says {}."),
            ("thing_colors", "What color is {}?", "{} is {}."),
        )
    )
    table = lexicon().tables[name]
    key = rng.choice(list(table))
    return question.format(key), _capital(answer.format(key, table[key]))


def _sentence(rng: random.Random, question: str, mark: str) -> str:
    return _casing(rng, rng.choice(_ASK_OPENINGS) + question, mark)


def _casing(rng: random.Random, text: str, mark: str) -> str:
    """The text as people type it: mostly with a capital and a mark, sometimes without."""
    text = text.rstrip(".?!")
    style = rng.random()
    if style < 0.8:
        return _capital(text) + mark
    if style < 0.9:
        return _capital(text)
    return text[:1].lower() + text[1:]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _join(clauses: Sequence[str]) -> str:
    if len(clauses) == 1:
        return clauses[0]
    return ", ".join(clauses[:-1]) + " and " + clauses[-1]
