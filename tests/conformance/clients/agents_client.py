"""What `openai-agents` does with a server that remembers: run as `python agents_client.py BASE_URL`; prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from agents import Agent, ModelSettings, OpenAIConversationsSession, OpenAIResponsesModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI

# The model has learnt nothing and ends at the first small letter: agents take no answer that was cut off.
ENDS = {"stop_token_ids": list(range(ord("a"), ord("z") + 1)), "seed": 1}


async def talk(base_url: str) -> dict[str, Any]:
    """Hold conversations in each of the ways the package knows."""
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0, _strict_response_validation=True)
    model = OpenAIResponsesModel("test", client)
    agent = Agent(name="Ada", instructions="Be kind.", model=model, model_settings=ModelSettings(extra_body=ENDS))
    told: dict[str, Any] = {}

    session = OpenAIConversationsSession(openai_client=client)
    first = await Runner.run(agent, "Hello.", session=session)
    second = await Runner.run(agent, "And?", session=session)
    told["session"] = [first.final_output, second.final_output]
    told["session_roles"] = [item.get("role") for item in await session.get_items()]
    await session.pop_item()
    told["session_roles_after_pop"] = [item.get("role") for item in await session.get_items()]
    await session.clear_session()

    first = await Runner.run(agent, "Hello.")
    second = await Runner.run(agent, "And?", previous_response_id=first.last_response_id)
    told["chain"] = [first.final_output, second.final_output]
    told["chain_cached"] = second.raw_responses[0].usage.input_tokens_details.cached_tokens
    told["chain_known"] = first.raw_responses[0].usage.total_tokens

    conversation = await client.conversations.create()
    first = await Runner.run(agent, "Hello.", conversation_id=conversation.id)
    streamed = Runner.run_streamed(agent, "And?", conversation_id=conversation.id)
    told["events"] = sorted({event.type async for event in streamed.stream_events()})
    told["conversation"] = [first.final_output, streamed.final_output]
    told["conversation_cached"] = streamed.raw_responses[0].usage.input_tokens_details.cached_tokens
    told["conversation_known"] = first.raw_responses[0].usage.total_tokens
    await client.close()
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(talk(sys.argv[1]))))
