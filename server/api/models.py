"""`GET /v1/models`, `GET /v1/initial_states`: what is being served, and what its histories may begin from."""

from __future__ import annotations

from fastapi import Response

from server.api.operations import Router
from server.errors import UnknownModel
from server.schemas.models import InitialStateCard, InitialStateList, ModelCard, ModelList
from server.services import ServedModel, ServicesOf
from server.streaming import json_response

router = Router()


@router.operation("GET", "/v1/models", reply=ModelList)
async def list_models(services: ServicesOf) -> Response:
    """List the one model."""
    return json_response(ModelList(data=[_card(services.model)]))


# A name may hold slashes, as Hugging Face's do.
@router.operation("GET", "/v1/models/{model_id:path}", reply=ModelCard, errors=[404])
async def retrieve_model(model_id: str, services: ServicesOf) -> Response:
    """Describe the one model."""
    if model_id != services.model.name:
        raise UnknownModel
    return json_response(_card(services.model))


@router.operation("GET", "/v1/initial_states", reply=InitialStateList)
async def list_initial_states(services: ServicesOf) -> Response:
    """List the tuned states that `initial_state` may name."""
    refs = services.model.engine.initial_states
    return json_response(InitialStateList(data=[InitialStateCard(id=r.name, fingerprint=r.fingerprint) for r in refs]))


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(
        id=model.name,
        created=model.created,
        generation=model.engine.generation,
        num_parameters=model.engine.num_parameters,
        state_bytes=model.engine.state_bytes,
        vocab_size=model.engine.vocab_size,
        fingerprint=model.engine.fingerprint,
        dtype=model.engine.dtype,
        state_dtype=model.engine.state_dtype,
    )
