"""What an engine is told when it starts. Nothing else reaches it: it reads no environment and no file of settings."""

from __future__ import annotations

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that shapes an engine, fixed for its life.

    Crosses to the engine process as JSON on its standard input.
    """

    model_path: str  # .pth, .safetensors, or a directory that holds one
    tokenizer: str = "auto"  # auto | bytes | world | path to a tokenizer.json
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16 | int8: of the weights
    state_dtype: str = "float32"  # float32 | float16: of the states' matrices
    head_norm_eps: float | None = None  # None: 1e-5 x head size, as in the official models
    max_num_seqs: int = 64  # sequences that run at once
    max_num_batched_tokens: int = 512  # tokens consumed by one step, decodes included
    max_num_queued_reqs: int = 1024  # sequences that may wait for a slot
    max_logprobs: int = 20
    num_threads: int = 0  # 0: one a core, or just one for a small model
    state_url: str = "memory:"  # memory: | file:///DIR | redis://HOST:PORT/DB
    checkpoint_ttl_seconds: float = 86_400.0  # promise P14: losing a checkpoint costs time, never data
    hot_state_bytes: int = 1 << 30  # host memory for states between turns
    prefix_min_tokens: int = 16  # prompts' prefixes shorter than this are computed again rather than kept
    prefix_store_min_tokens: int = 256  # of shared prefixes, those at least so long reach the state store, too
    initial_states: str | None = None  # directory of tuned states that histories may begin from
