"""llama.cpp: `python llama_cpp_peer.py MODEL THREADS [FORMAT]`, in an environment with `llama-cpp-python` and `gguf`.

FORMAT is that of the large matrices, BF16 or Q8_0.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf  # type: ignore[import-not-found]
import llama_cpp as llama  # type: ignore[import-not-found]
import numpy as np
from protocol import answer_questions

NAMES = {
    "emb": "token_embd", "head": "output", "ln_out": "output_norm", "blocks.0.ln0": "token_embd_norm",
    "ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln", "ffn.x_k": "channel_mix_lerp_k",
    "ffn.key": "channel_mix_key", "ffn.value": "channel_mix_value",
}  # fmt: skip
TRANSPOSED = tuple(f"att.{letter}{i}" for letter in "wavg" for i in (1, 2))
LOW_RANK = tuple(f"time_mix_{letter}{i}.weight" for letter in "wavg" for i in (1, 2))
FLOAT32 = ("time_mix_w1.weight", "time_mix_w2.weight", "time_mix_lerp_fused.weight")  # as its own converter has it


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor's bfloat16 values as uint16."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        data = np.frombuffer(file.read(), np.uint16)
    header.pop("__metadata__", None)
    assert all(entry["dtype"] == "BF16" for entry in header.values())
    return {
        name: data[entry["data_offsets"][0] // 2 : entry["data_offsets"][1] // 2].reshape(entry["shape"])
        for name, entry in header.items()
    }


def gguf_tensors(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors by GGUF's names, in its layouts."""
    tensors = {}
    for name, values in weights.items():
        stem, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        layer, inner = "", stem
        if stem.startswith("blocks.") and stem not in NAMES:
            layer, inner = f"blk.{stem.split('.')[1]}.", stem.split(".", 2)[2]
        if inner.startswith("att.x_"):
            continue
        target = layer + NAMES.get(inner, inner.replace("att.", "time_mix_")) + "." + kind
        values = values.T if inner in TRANSPOSED else values.reshape(-1) if inner == "att.r_k" else values.squeeze()
        tensors[target] = np.ascontiguousarray(values)
        if layer == "blk.0." and inner in ("att.a0", "att.a1", "att.a2"):
            tensors[target.replace("time_mix_a", "time_mix_v")] = tensors[target]  # not used, but wanted
    for layer_idx in range(num_layers(weights)):
        mixes = [weights[f"blocks.{layer_idx}.att.x_{letter}"].reshape(1, 1, -1) for letter in "rwkvag"]
        tensors[f"blk.{layer_idx}.time_mix_lerp_fused.weight"] = np.stack(mixes)
    return tensors


def num_layers(weights: dict[str, np.ndarray]) -> int:
    """Return how many blocks there are."""
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))


def convert(source: Path, target: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write the weights as GGUF, large matrices as `kind` has them, low-rank ones in bfloat16."""
    weights = read_safetensors(source)
    vocab_size, width = weights["emb.weight"].shape
    writer = gguf.GGUFWriter(target, "rwkv7")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(width)
    writer.add_block_count(num_layers(weights))
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(weights["blocks.0.att.r_k"].shape[1])
    writer.add_decay_lora_rank(weights["blocks.0.att.w1"].shape[1])
    writer.add_iclr_lora_rank(weights["blocks.0.att.a1"].shape[1])
    writer.add_value_residual_mix_lora_rank(weights["blocks.1.att.v1"].shape[1])
    writer.add_gate_lora_rank(weights["blocks.0.att.g1"].shape[1])
    writer.add_feed_forward_length(weights["blocks.0.ffn.key.weight"].shape[0])
    writer.add_head_count(0)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([b"<s>", *(b"t%d" % i for i in range(1, vocab_size))])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (vocab_size - 1)])
    for name, values in gguf_tensors(weights).items():
        if values.ndim == 1 or name.endswith(FLOAT32):
            writer.add_tensor(name, as_float32(values))
        elif kind == gguf.GGMLQuantizationType.BF16 or name.endswith(LOW_RANK):
            writer.add_tensor(name, values.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, gguf.quants.quantize(as_float32(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_float32(values: np.ndarray) -> np.ndarray:
    """Return the numbers that bfloat16 bits stand for."""
    return (values.astype(np.uint32) << 16).view(np.float32)


class LlamaCpp:
    """Its C interface: one context for decoding many sequences, one batch a step."""

    max_batch = 64
    max_prompt = 512

    def __init__(self, path: str, num_threads: int, kind: str = "BF16") -> None:
        model_path = Path(path).with_suffix(f".{kind}.gguf")
        if not model_path.exists():
            partial = model_path.with_name("partial-" + model_path.name)
            convert(Path(path), partial, gguf.GGMLQuantizationType[kind])
            partial.rename(model_path)
        llama.llama_backend_init()
        model = llama.llama_model_load_from_file(str(model_path).encode(), llama.llama_model_default_params())
        assert model, "llama.cpp does not load the model"
        self._num_tokens = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 1 << 16, 512, 512, self.max_batch
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama.llama_init_from_model(model, params)
        assert self._context, "llama.cpp makes no context"
        self._batch = llama.llama_batch_init(512, 0, 1)
        self._position = 0

    def begin(self, batch_size: int) -> None:
        """Empty sequences."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._position = 0

    def decode(self, token_ids: list[int]) -> None:
        """One token a sequence, logits of all."""
        self._run([(token_id, self._position, sequence, True) for sequence, token_id in enumerate(token_ids)])
        self._position += 1

    def prefill(self, token_ids: list[int]) -> list[float]:
        """A prompt in one batch, logits of its last token."""
        self.begin(1)
        last = len(token_ids) - 1
        self._run([(token_id, position, 0, position == last) for position, token_id in enumerate(token_ids)])
        return self.last_logits()

    def last_logits(self) -> list[float]:
        """Of the last token of the last batch."""
        logits = llama.llama_get_logits_ith(self._context, -1)
        return [*ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._num_tokens)).contents]

    def _run(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token_id, position, sequence, wants_logits) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token_id, position, wants_logits
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        assert llama.llama_decode(self._context, batch) == 0
        llama.llama_synchronize(self._context)


if __name__ == "__main__":
    answer_questions(LlamaCpp(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
