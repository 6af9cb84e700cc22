"""What `langchain-openai` does with the Responses API: run as `python langchain_client.py BASE_URL`; prints JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI

ENDS = {"stop_token_ids": list(range(ord("a"), ord("z") + 1)), "seed": 1}


def model(base_url: str, **options: Any) -> ChatOpenAI:
    """Return the package's client of the Responses API."""
    return ChatOpenAI(
        model="test",
        base_url=base_url,
        api_key="unused",
        max_retries=0,
        use_responses_api=True,
        extra_body=ENDS,
        **options,
    )


def usage(message: AIMessage) -> dict[str, int]:
    """Return the tokens in all, and those that cost nothing."""
    assert message.usage_metadata is not None
    return {
        "total": message.usage_metadata["total_tokens"],
        "cached": message.usage_metadata["input_token_details"]["cache_read"],
    }


def talk(base_url: str) -> dict[str, Any]:
    """Continue a response by its id, by hand and by the package's own switch, and stream one."""
    plain = model(base_url)
    first = plain.invoke("Hello.")
    second = plain.invoke("And?", previous_response_id=first.response_metadata["id"])
    told: dict[str, Any] = {"by_hand": [usage(first), usage(second)], "answers": [first.text, second.text]}

    switched = model(base_url, use_previous_response_id=True)
    history: list[Any] = [HumanMessage("Hello.")]
    history.append(switched.invoke(history))
    again = switched.invoke([*history, HumanMessage("And?")])
    told["by_switch"] = [usage(history[-1]), usage(again)]
    told["switched_answers"] = [history[-1].text, again.text]

    told["streamed"] = "".join(chunk.text for chunk in plain.stream("Hello."))
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(talk(sys.argv[1])))
