"""`POST /v1/completions`: continue a text, or several, or a conversation as it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated

import msgspec
from fastapi import Depends, Request, Response

from engine.messages import FinishReason, TokenLogprobs
from engine.tokenizer import Detokenizer, Tokenizer
from server.api.operations import IDEMPOTENCY_KEY, IF_MATCH, TURN_ERRORS, Router
from server.api.replays import completion_frames, replayed
from server.api.replies import Identity, Meter, clamped, finish_reason, most_likely, new_reply_id, stop_reason
from server.api.requests import (
    begin,
    check_model,
    check_num_logprobs,
    conversation_of,
    expected_version,
    initial_state_of,
    limited,
    with_choice,
    with_reply,
)
from server.conversations.open_turn import OpenTurn, TurnContent
from server.errors import Answer, BadRequest
from server.frames import DONE, FrameTemplate, frame
from server.generation import (
    ChoiceEvent,
    ChoicePlan,
    Delivered,
    Finished,
    Generation,
    Outcome,
    Prompted,
    generate_choices,
    generate_turn,
)
from server.idempotency import Kept, key_of
from server.items import AnswerIds, answered, said
from server.parsing import json_body
from server.schemas.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt
from server.services import Services, ServicesOf
from server.streaming import respond, whole_reply
from server.templates import AnswerText
from server.tenants import tenant_of

router = Router()

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.operation(
    "POST",
    "/v1/completions",
    body=CompletionRequest,
    reply=Completion,
    chunk=Completion,
    errors=TURN_ERRORS,
    headers=[IF_MATCH, IDEMPOTENCY_KEY],
)
async def create_completion(
    request: Request, body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))], services: ServicesOf
) -> Response:
    """Continue a prompt."""
    check_model(body.model, services)
    version = expected_version(request, body)
    planner = Planner(services, body)
    prompts = [await planner.token_ids(prompt) for prompt in body.prompts]
    selector = conversation_of(body, services, tenant_of(request))
    key = await key_of(request, "" if selector is None else selector.conversation_id)
    attempt = await services.claims.attempt(key, new_reply_id("cmpl"))
    if isinstance(attempt, Kept):
        frames = partial(completion_frames, include_usage=body.stream_options.include_usage)
        return replayed(attempt.reply, frames, stream=body.stream)
    writer = CompletionWriter(Identity(attempt.reply_id, services.model), services.tokenizer, body)

    async def keep_reply(outcomes: Sequence[Outcome]) -> None:
        await attempt.keep(whole_reply(writer.again(), outcomes))

    async def work(generation: Generation) -> None:
        if selector is None:
            keep = keep_reply if attempt.has_key else None
            await generate_choices(services, generation, tenant_of(request), planner.plans(prompts), keep)
            return
        async with services.turns.open(selector, if_match=version, queue_seconds=body.queue_ms / 1000) as turn:
            await attempt.enter(turn.conversation.conversation_id)
            base = await turn.base()
            if base.items:
                raise BadRequest("conversation: has items that only a chat turn can say first.", "conversation")
            plan = planner.plans(prompts, continues=base.num_tokens > 0)[0]
            content = planner.content_of(turn, plan)
            await generate_turn(services, generation, turn, plan, with_reply(content, attempt, writer.again))

    generation = await begin(request, services, body, attempt, work)
    return await respond(request, generation, writer, services.metrics.http, stream=body.stream)


class Planner:
    """What to generate for a request."""

    def __init__(self, services: Services, body: CompletionRequest) -> None:
        self._services = services
        self._tokenizer = tokenizer = services.tokenizer
        self._body = body
        num_logprobs = check_num_logprobs("logprobs", body.logprobs, services)
        if body.num_candidates > body.n and num_logprobs is None:
            num_logprobs = 0  # of each token alone: what the best are chosen by
        max_tokens = limited("max_tokens", body.max_tokens, DEFAULT_MAX_TOKENS, services.settings.max_output_tokens)
        self._sampling = body.sampling(tokenizer.vocab_size, num_logprobs)
        self._stop = body.stop_rules(max_tokens, tokenizer.vocab_size, tokenizer.eos_token_ids)
        self._initial_state = initial_state_of(body.initial_state, services)

    async def token_ids(self, prompt: Prompt) -> list[int]:
        """Return the prompt's tokens; raises `BadRequest` for ids that are none."""
        if isinstance(prompt, str):
            return await self._services.encode(prompt)
        vocab_size = self._tokenizer.vocab_size
        if prompt and not (min(prompt) >= 0 and max(prompt) < vocab_size):
            raise BadRequest(f"prompt: token ids must lie in [0, {vocab_size}).", "prompt")
        return prompt

    def plans(self, prompts: Sequence[list[int]], *, continues: bool = False) -> list[ChoicePlan]:
        """Return the candidates of every prompt, in order."""
        return [
            ChoicePlan(
                index=prompt_idx * self._body.num_candidates + choice_idx,
                prompt_ids=self._begun(prompt_ids, continues),
                sampling=with_choice(self._sampling, choice_idx),
                stop=self._stop,
                num_prompt_logprobs=self._body.logprobs if self._body.echo else None,
                priority=self._body.priority,
                initial_state=self._initial_state,
            )
            for prompt_idx, prompt_ids in enumerate(prompts)
            for choice_idx in range(self._body.num_candidates)
        ]

    def content_of(self, turn: OpenTurn, plan: ChoicePlan) -> Callable[[Outcome], TurnContent]:
        """Return what makes a turn's content of what came after the prompt: text without a template."""

        def content(outcome: Outcome) -> TurnContent:
            prompt = said("unknown", self._tokenizer.decode(plan.prompt_ids))
            is_complete = outcome.finished.reason is not FinishReason.LENGTH
            answer = answered(
                AnswerText(content=outcome.whole.text), turn.answer_id, AnswerIds(), is_complete=is_complete
            )
            return TurnContent(items=[prompt, *answer])

        return content

    def _begun(self, prompt_ids: list[int], continues: bool) -> list[int]:
        """Return what to feed: a model needs one token to say what comes next, and end of text begins a new one."""
        if prompt_ids:
            return prompt_ids
        if continues:
            raise BadRequest("prompt: an empty prompt cannot continue a conversation.", "prompt")
        if not self._tokenizer.eos_token_ids:
            raise BadRequest("prompt: must not be empty: this model has no end-of-text token to begin with.", "prompt")
        return [self._tokenizer.eos_token_ids[0]]


class CompletionWriter:
    """What a completion says."""

    def __init__(self, identity: Identity, tokenizer: Tokenizer, body: CompletionRequest) -> None:
        num_choices = len(body.prompts) * body.num_candidates
        self._tokenizer = tokenizer
        self._body = body
        self._identity = identity
        self._meter = Meter(body.num_candidates)
        self._choices = [CompletionChoice(index=index, text="") for index in range(num_choices)]
        self._logprobs = [LogprobsWriter(tokenizer) for _ in range(num_choices)]
        self._templates = [self._template(index) for index in range(num_choices)]
        self._scores = [_Score() for _ in range(num_choices)]

    def again(self) -> CompletionWriter:
        """Return a writer that is still to say the same."""
        return CompletionWriter(self._identity, self._tokenizer, self._body)

    def opening(self) -> bytes:
        """Return nothing: a completion begins with its first text."""
        return b""

    def frames(self, event: ChoiceEvent) -> bytes:
        """Return a chunk for all that the event adds to its choice."""
        if isinstance(event, Delivered) and event.logprobs is None and not self._body.return_token_ids:
            return self._templates[event.index].fill(event.text) if event.text else b""
        return b"".join(frame(self._chunk_of(part)) for part in self._parts(event))

    def _template(self, index: int) -> FrameTemplate:
        return FrameTemplate(lambda text: frame(self._chunk_of(CompletionChoice(index=index, text=text))))

    def closing(self) -> bytes:
        """Return the usage, if asked for, and the end."""
        return frame(self._whole([])) + DONE if self._body.stream_options.include_usage else DONE

    def failure(self, told: Answer) -> bytes:
        """Return the error, in place of the end."""
        return frame(told.body)

    def add(self, event: ChoiceEvent) -> None:
        """Add what the event brings to its choice."""
        for part in self._parts(event):
            self._merge(part)

    def _parts(self, event: ChoiceEvent) -> Iterator[CompletionChoice]:
        """Yield what the event adds to its choice, if a reader can see it."""
        self._meter.see(event)
        if isinstance(event, Prompted) and (self._body.echo or self._body.return_token_ids):
            yield self._prompted(event)
        elif isinstance(event, Delivered):
            self._scores[event.index].see(event)
            if event.text or event.logprobs or self._body.return_token_ids:
                yield self._delivered(event)
        elif isinstance(event, Finished):
            yield self._finished(event)

    def _prompted(self, event: Prompted) -> CompletionChoice:
        prompt = self._body.prompts[event.index // self._body.num_candidates]
        part = CompletionChoice(index=event.index, text="")
        if self._body.return_token_ids:
            part.prompt_token_ids = event.prompt_ids
        if self._body.echo:
            part.text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
            if event.logprobs is not None:
                part.logprobs = self._logprobs[event.index].write(event.prompt_ids, event.logprobs)
        return part

    def _delivered(self, event: Delivered) -> CompletionChoice:
        part = CompletionChoice(index=event.index, text=event.text)
        if self._body.return_token_ids:
            part.token_ids = event.token_ids
        if event.logprobs is not None and self._body.logprobs is not None:
            part.logprobs = self._logprobs[event.index].write(event.token_ids, event.logprobs)
        return part

    def _finished(self, event: Finished) -> CompletionChoice:
        part = CompletionChoice(
            index=event.index, text="", finish_reason=finish_reason(event), stop_reason=stop_reason(event)
        )
        # Harnesses that score echoed prompts drop the last entry as the generated token's: it must be there even if
        # that token was the end of the text, which is no output.
        if self._body.echo and event.stop_logprobs is not None and isinstance(event.stop_reason, int):
            part.logprobs = self._logprobs[event.index].write([event.stop_reason], [event.stop_logprobs])
        return part

    def _chunk_of(self, part: CompletionChoice) -> Completion:
        """Return `part` as a chunk; the choice's last one says where its conversation stands."""
        chunk = self._completion([part])
        if part.finish_reason is not None:
            chunk.conversation = self._meter.conversation
        if self._body.stream_options.include_usage:
            chunk.usage = None
        return chunk

    def _merge(self, part: CompletionChoice) -> None:
        choice = self._choices[part.index]
        choice.text += part.text
        choice.finish_reason = part.finish_reason or choice.finish_reason
        choice.stop_reason = part.stop_reason if part.stop_reason is not None else choice.stop_reason
        if part.logprobs is not None:
            choice.logprobs = CompletionLogprobs() if choice.logprobs is None else choice.logprobs
            choice.logprobs.extend(part.logprobs)
        if part.prompt_token_ids is not msgspec.UNSET:
            choice.prompt_token_ids, choice.token_ids = part.prompt_token_ids, []
        if part.token_ids is not msgspec.UNSET and choice.token_ids is not msgspec.UNSET:
            choice.token_ids += part.token_ids

    def reply(self) -> Completion:
        """Return the whole reply: of every prompt's candidates the best, the best of them first."""
        if self._body.num_candidates == self._body.n:
            return self._whole(self._choices)
        told = []
        for start in range(0, len(self._choices), self._body.num_candidates):
            candidates = self._choices[start : start + self._body.num_candidates]
            candidates.sort(key=lambda choice: -self._scores[choice.index].mean)
            told += candidates[: self._body.n]
        return self._whole([msgspec.structs.replace(choice, index=index) for index, choice in enumerate(told)])

    def _whole(self, choices: list[CompletionChoice]) -> Completion:
        completion = self._completion(choices)
        completion.usage = self._meter.usage
        completion.conversation = self._meter.conversation
        return completion

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        identity = self._identity
        return Completion(
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.system_fingerprint,
            choices=choices,
        )


class _Score:
    """How likely a candidate is, whatever its length."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._num_tokens = 0

    def see(self, event: Delivered) -> None:
        """Take in more of the candidate."""
        self._sum += sum(entry.logprob for entry in event.logprobs or ())
        self._num_tokens += len(event.token_ids)

    @property
    def mean(self) -> float:
        """The mean log-probability of its tokens. A candidate that says nothing comes after all others."""
        return self._sum / self._num_tokens if self._num_tokens else -math.inf


class LogprobsWriter:
    """The log-probabilities of one choice in OpenAI's four lists, with each token's place in the choice's text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._num_chars = 0

    def write(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """Return the lists of the tokens that come next; an entry without a value becomes null."""
        lists = CompletionLogprobs()
        for token_id, entry in zip(token_ids, entries, strict=True):
            lists.tokens.append(self._tokenizer.token_text(token_id))
            lists.token_logprobs.append(None if entry is None else clamped(entry.logprob))
            lists.top_logprobs.append(None if entry is None else self._top(token_id, entry))
            lists.text_offset.append(self._num_chars)
            self._num_chars += len(self._detokenizer.push([token_id]))
        return lists

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        names = {self._tokenizer.token_text(top_id): value for top_id, value in most_likely(entry)}
        return names | {self._tokenizer.token_text(token_id): clamped(entry.logprob)}
