"""The unmodified `openai` client, plain and strict: what it sends is understood, what it gets validates."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.server_process import ServerProcess

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello."}]


@pytest.fixture(params=[False, True], ids=["plain", "strict"])
def client(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    """The stock client; strict means that every reply is validated against OpenAI's types."""
    with server.client(strict=request.param) as client:
        yield client


@pytest.fixture
def plain(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """The stock client as it is by default."""
    with server.client() as client:
        yield client


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    """The one model, by the name under which it is served."""
    assert [model.id for model in client.models.list()] == ["test"]
    assert client.models.retrieve("test").owned_by == "sostenuto"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("gpt-17")
    assert raised.value.code == "model_not_found"


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    """A whole reply: identity, message, finish reason, usage."""
    reply = client.chat.completions.create(model="test", messages=MESSAGES, max_completion_tokens=5, stop=["☃"])
    assert reply.id.startswith("chatcmpl-")
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply._request_id


def test_a_chat_streams(client: openai.OpenAI) -> None:
    """The role comes first, the finish reason in a chunk of its own, the usage last when asked for."""
    chunks = list(
        client.chat.completions.create(
            model="test", messages=MESSAGES, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    finishing = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert len(finishing) == 1
    assert finishing[0] is chunks[-2]
    assert finishing[0].choices[0].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_accumulating_stream_works(client: openai.OpenAI) -> None:
    """`chat.completions.stream()` puts the chunks together to what a whole reply says."""
    # The helper raises where an answer was cut off by its length: let it stop.
    stop = {"stop_token_ids": list(range(ord("a"), ord("z")))}
    options = {"model": "test", "messages": MESSAGES, "seed": 5, "extra_body": stop}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    with client.chat.completions.stream(**options) as stream:  # type: ignore[arg-type]
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == whole.choices[0].message.content
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_log_probabilities_validate(client: openai.OpenAI) -> None:
    """Every token with its bytes and the most likely alternatives, most likely first."""
    reply = client.chat.completions.create(
        model="test", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0
    )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content
    assert content
    for token in content:
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, values[0])


def test_a_completion_is_answered(client: openai.OpenAI) -> None:
    """Text, several prompts, several choices: as many choices as asked for, in order."""
    reply = client.completions.create(model="test", prompt=["one", "two"], n=2, max_tokens=3, logprobs=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is not None for choice in reply.choices)


def test_a_completion_streams(plain: openai.OpenAI) -> None:
    """Only loosely: OpenAI's own types do not allow the null finish reason that OpenAI streams."""
    chunks = list(plain.completions.create(model="test", prompt="x", max_tokens=3, seed=1, stream=True))
    whole = plain.completions.create(model="test", prompt="x", max_tokens=3, seed=1)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_conversation_is_created_retrieved_and_deleted(client: openai.OpenAI) -> None:
    """The client's own methods for conversations."""
    made = client.conversations.create(metadata={"topic": "tests"})
    assert made.id.startswith("conv_")
    assert client.conversations.retrieve(made.id).metadata == {"topic": "tests"}
    assert client.conversations.delete(made.id).deleted
    with pytest.raises(openai.APIStatusError) as raised:
        client.conversations.retrieve(made.id)
    assert raised.value.status_code == 410


def test_a_conversation_is_held(client: openai.OpenAI, request: pytest.FixtureRequest) -> None:
    """Turn by turn with the new message only; the replies count versions and say where the state came from."""
    conversation_id = f"held-{'strict' if 'strict' in request.node.name else 'plain'}"
    infos = []
    for line in ("My name is Ada.", "What is my name?", "Good night."):
        reply = client.chat.completions.create(
            model="test",
            messages=[{"role": "user", "content": line}],
            max_tokens=4,
            extra_body={"conversation_id": conversation_id},
        )
        assert reply.model_extra is not None
        infos.append(reply.model_extra["conversation"])
    assert [info["version"] for info in infos] == [1, 2, 3]
    assert [info["parent_version"] for info in infos] == [0, 1, 2]
    assert infos[0]["resume"] == "new"
    assert all(info["resume"] in ("hot", "restored", "replayed") for info in infos[1:])
    assert all(info["id"] == conversation_id and info["durability"] == "fsynced" for info in infos)


def test_mistakes_raise_the_clients_own_errors(plain: openai.OpenAI) -> None:
    """400 and 404 map to the classes users catch."""
    with pytest.raises(openai.BadRequestError) as raised:
        plain.chat.completions.create(model="test", messages=MESSAGES, n=99)
    assert raised.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        plain.chat.completions.create(
            model="test", messages=MESSAGES, extra_body={"conversation": {"id": "never-made"}}
        )
    assert missing.value.code == "conversation_not_found"


def test_a_conversation_is_kept_by_the_client(client: openai.OpenAI) -> None:
    """Everything the client can do with a conversation and its items; deleting an item returns the conversation."""
    made = client.conversations.create(
        metadata={"a": "b"}, items=[{"type": "message", "role": "user", "content": "One."}]
    )
    assert client.conversations.retrieve(made.id) == made
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    added = client.conversations.items.create(
        made.id, items=[{"type": "message", "role": "user", "content": text} for text in ("Two.", "Three.")]
    )
    assert len(added.data) == 2
    first = added.data[0]
    assert client.conversations.items.retrieve(first.id or "", conversation_id=made.id) == first
    assert client.conversations.items.delete(first.id or "", conversation_id=made.id).id == made.id
    left = client.conversations.items.list(made.id, order="asc")
    assert [item.to_dict()["content"][0]["text"] for item in left] == ["One.", "Three."]  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(first.id or "", conversation_id=made.id)
    assert client.conversations.delete(made.id).deleted
    with pytest.raises(openai.APIStatusError) as raised:
        client.conversations.retrieve(made.id)
    assert raised.value.status_code == 410
