"""How many tokens fit: KV cache arithmetic for a target and its draft, from config.json and safetensors headers alone.

The formula is that of PagedAttention as vLLM allocates it (Kwon et al. 2023, arXiv 2309.06180): a block holds
`block_size` tokens of every layer, target's and draft's alike, so the blocks are counted over both models together.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from quantkit import foreign, headers
from quantkit.architecture import size_problems
from quantkit.errors import QuantkitError, raise_all
from quantkit.headers import Header
from quantkit.kv_scheme import KINDS, has_kv_scheme

# Bits, not bytes: the 4-bit floats of newer checkpoints have no whole byte.
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "F4": 4,
}  # fmt: skip


class Sizing(BaseModel):
    """What a target, with its draft if there is one, takes on one rank of a tensor-parallel group.

    All bytes are of one rank. Weights are exact for a single rank and an estimate above it: linears and embeddings are
    shared out, norms are not. `reserved_bytes` (activations, CUDA graphs, the runtime) is an estimate always.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    tensor_parallel_size: int
    kv_cache_dtype: str
    block_size: int
    target_weight_bytes: int
    draft_weight_bytes: int
    target_kv_bytes_per_token: int
    draft_kv_bytes_per_token: int
    reserved_bytes: int
    kv_cache_bytes: int
    num_blocks: int
    kv_cache_tokens: int
    max_model_len: int
    concurrency: float

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one token of context takes in the cache of one rank, target and draft together."""
        return self.target_kv_bytes_per_token + self.draft_kv_bytes_per_token

    @property
    def fits(self) -> bool:
        """Whether one sequence of `max_model_len` tokens fits; vLLM refuses to start where it does not."""
        return self.concurrency >= 1


def size(
    target: Path,
    draft: Path | None = None,
    *,
    kv_cache_bytes: int | None = None,
    gpu_memory_bytes: int | None = None,
    gpu_memory_utilization: float = 0.92,
    reserved_bytes: int = 2 << 30,
    tensor_parallel_size: int = 1,
    kv_cache_dtype: str = "auto",
    skip_layers: Collection[int] = (),
    dtype: str = "auto",
    block_size: int = 16,
    max_model_len: int | None = None,
) -> Sizing:
    """Size a pair of checkpoint directories, either for a given cache or for what one GPU's memory leaves over.

    Args:
        target: checkpoint directory; its config.json and the headers of its safetensors are read, never the tensors.
        draft: the draft's, whose weights and KV cache share the memory of the target.
        kv_cache_bytes: bytes of the cache on one rank. Exclusive with `gpu_memory_bytes`.
        gpu_memory_bytes: total bytes of one GPU; the cache is what weights and `reserved_bytes` leave of
            `gpu_memory_utilization` of it, 0 when they leave nothing.
        reserved_bytes: activations, CUDA graphs and runtime of one rank: an estimate, only used with
            `gpu_memory_bytes`.
        kv_cache_dtype: as vLLM's flag; "auto" is FP8 where the checkpoint carries a KV scheme, else `dtype`.
        skip_layers: of the target, whose cache keeps 16 bits (`--kv-cache-dtype-skip-layers`); the draft's layers of
            the same numbers, too: vLLM goes by the number alone.
        dtype: as vLLM's flag; "auto" is the 16-bit type of the checkpoint.
        block_size: tokens a block (vLLM: 16 on a GPU, 128 on a CPU by default).
        max_model_len: tokens of one sequence; the model's own limit by default.

    Raises:
        QuantkitError: a file is missing or damaged, or the heads do not divide by `tensor_parallel_size`.
    """
    context = max_model_len or int(read_config(target).get("max_position_embeddings", 0))
    if context <= 0:
        raise QuantkitError(f"{target}/config.json has no max_position_embeddings: give max_model_len")
    return fit(
        read_config(target), weight_bytes(target), read_config(draft) if draft else None,
        weight_bytes(draft) if draft else 0, kv_cache_bytes=kv_cache_bytes, gpu_memory_bytes=gpu_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization, reserved_bytes=reserved_bytes,
        tensor_parallel_size=tensor_parallel_size, kv_cache_dtype=kv_cache_dtype, skip_layers=skip_layers, dtype=dtype,
        block_size=block_size, max_model_len=context,
    )  # fmt: skip


def fit(
    config: Mapping[str, Any],
    stored_bytes: int,
    draft_config: Mapping[str, Any] | None = None,
    draft_stored_bytes: int = 0,
    *,
    max_model_len: int,
    kv_cache_bytes: int | None = None,
    gpu_memory_bytes: int | None = None,
    gpu_memory_utilization: float = 0.92,
    reserved_bytes: int = 2 << 30,
    tensor_parallel_size: int = 1,
    kv_cache_dtype: str = "auto",
    skip_layers: Collection[int] = (),
    dtype: str = "auto",
    block_size: int = 16,
) -> Sizing:
    """`size` for models of which only config.json and the bytes of the weights are known.

    Raises:
        QuantkitError: the heads do not divide by `tensor_parallel_size`.
    """
    if (kv_cache_bytes is None) == (gpu_memory_bytes is None):
        raise QuantkitError("give kv_cache_bytes or gpu_memory_bytes to size for, and only one of them")
    raise_all(
        head_problems(config, tensor_parallel_size, "target")
        + (head_problems(draft_config, tensor_parallel_size, "draft") if draft_config else [])
    )
    resolved = kv_dtype(config, kv_cache_dtype, dtype)
    target_kv = kv_bytes_per_token(config, resolved, tensor_parallel_size, skip_layers=skip_layers)
    # vLLM gives the draft's cache the target's element type, whatever the draft's own config says.
    draft_kv = 0
    if draft_config:
        draft_kv = kv_bytes_per_token(draft_config, resolved, tensor_parallel_size, skip_layers=skip_layers)
    target_weights = math.ceil(stored_bytes / tensor_parallel_size)
    draft_weights = math.ceil(draft_stored_bytes / tensor_parallel_size)
    if gpu_memory_bytes is not None:
        usable = math.ceil(gpu_memory_bytes * gpu_memory_utilization)
        kv_cache_bytes = max(0, usable - target_weights - draft_weights - reserved_bytes)
    assert kv_cache_bytes is not None
    num_blocks = kv_cache_bytes // ((target_kv + draft_kv) * block_size)
    return Sizing(
        tensor_parallel_size=tensor_parallel_size,
        kv_cache_dtype=resolved,
        block_size=block_size,
        target_weight_bytes=target_weights,
        draft_weight_bytes=draft_weights,
        target_kv_bytes_per_token=target_kv,
        draft_kv_bytes_per_token=draft_kv,
        reserved_bytes=reserved_bytes if gpu_memory_bytes is not None else 0,
        kv_cache_bytes=kv_cache_bytes,
        num_blocks=num_blocks,
        kv_cache_tokens=num_blocks * block_size,
        max_model_len=max_model_len,
        concurrency=num_blocks / math.ceil(max_model_len / block_size),
    )


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config.json of a checkpoint directory; of a head of the speculators format with the sizes of its layer."""
    path = checkpoint / "config.json"
    try:
        config = foreign.json_object(path, remedy="download or write the checkpoint again", within=checkpoint)
    except FileNotFoundError:
        raise QuantkitError(f"{path} is not there: give a checkpoint directory in Hugging Face form") from None
    layer = config.get("transformer_layer_config")
    config = (layer if isinstance(layer, dict) else {}) | config
    missing = [key for key in ("num_hidden_layers", "num_attention_heads", "hidden_size") if key not in config]
    if missing:
        raise QuantkitError(f"{path} lacks {', '.join(missing)}: give a decoder-only checkpoint of the Llama family")
    raise_all([f"{path}: {problem}" for problem in size_problems(config)])
    return config


def speculative_method(draft_config: Mapping[str, Any]) -> Literal["draft_model", "eagle3"]:
    """vLLM's word for the kind of a draft. It must be said: vLLM guesses from the draft's path otherwise."""
    return "eagle3" if draft_config.get("speculators_model_type") == "eagle3" else "draft_model"


def kv_bytes_per_token(
    config: Mapping[str, Any], kv_cache_dtype: str, tensor_parallel_size: int = 1, *, skip_layers: Collection[int] = ()
) -> int:
    """Bytes of keys and values that one token takes on one rank, all layers: grouped-query attention counted.

    2 * layers * ceil(kv_heads / TP) * head_dim * bytes, with layers that are skipped at 16 bits. A key-value head is
    the unit that is shared out: with more ranks than heads each rank keeps a whole one, so the cache stops shrinking.
    """
    heads, layers = math.ceil(kv_heads(config) / tensor_parallel_size), int(config["num_hidden_layers"])
    wide = len([index for index in set(skip_layers) if index < layers])
    bytes_of = (_cache_bytes_per_head(config, kind) for kind in (kv_dtype(config, kv_cache_dtype), "float16"))
    return 2 * heads * sum(count * size for count, size in zip((layers - wide, wide), bytes_of, strict=True))


def kv_dtype(config: Mapping[str, Any], kv_cache_dtype: str, dtype: str = "auto") -> str:
    """The element type of the cache that vLLM's words for cache and model stand for with this checkpoint."""
    if kv_cache_dtype != "auto":
        if kv_cache_dtype not in KINDS:
            raise QuantkitError(f"kv_cache_dtype {kv_cache_dtype!r} has no known size: use one of {sorted(KINDS)}")
        return kv_cache_dtype
    if has_kv_scheme(config):
        return "fp8"  # vLLM reads the scheme from the checkpoint and turns "auto" into it
    if dtype != "auto":
        return dtype
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float16")
    # "auto" never keeps float32: vLLM casts such a checkpoint to a 16-bit type.
    return "float16" if stored == "float32" else stored


def kv_heads(config: Mapping[str, Any]) -> int:
    """Key-value heads; a config without the field has full multi-head attention."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def head_problems(config: Mapping[str, Any], tensor_parallel_size: int, role: str) -> list[str]:
    """Why the heads of a model cannot be shared out over the ranks; empty when they can."""
    heads, keys = int(config["num_attention_heads"]), kv_heads(config)
    problems = []
    if heads % tensor_parallel_size:
        problems.append(
            f"{role}: {heads} attention heads do not divide by tensor_parallel_size {tensor_parallel_size}: "
            f"use one of {[n for n in range(1, heads + 1) if heads % n == 0]}"
        )
    elif keys % tensor_parallel_size and tensor_parallel_size % keys:
        problems.append(
            f"{role}: {keys} key-value heads neither divide by tensor_parallel_size {tensor_parallel_size} nor divide "
            "it: use a tensor_parallel_size that does"
        )
    return problems


def weight_bytes(checkpoint: Path) -> int:
    """Bytes of all tensors of a checkpoint, from the safetensors headers."""
    return sum(tensor_bytes(path) for path in safetensors_files(checkpoint))


def safetensors_files(checkpoint: Path) -> list[Path]:
    """The weight files that vLLM loads: those of the index where there is one, else all.

    Some published checkpoints hold the weights twice, sharded and in one consolidated file that the index leaves out.
    """
    try:
        files = sorted(set(headers.weight_map(checkpoint).values()))
    except FileNotFoundError:
        found = sorted(checkpoint.glob("*.safetensors"))
        if not found:
            raise QuantkitError(f"{checkpoint} has no *.safetensors: save the checkpoint in that format") from None
        return found
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise QuantkitError(f"{checkpoint} lacks {', '.join(missing)} that its index names: fetch the missing shards")
    return files


def bytes_of(checkpoint: Path, name: str) -> int:
    """Bytes of one tensor of a checkpoint; 0 where it has none of that name."""
    found = (tensor_shapes(path).get(name) for path in safetensors_files(checkpoint))
    return sum(_bytes(*one) for one in found if one is not None)


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors of one safetensors file; reads the header, maps the rest without touching it."""
    return sum(_bytes(dtype, shape) for dtype, shape in tensor_shapes(path).values())


def tensor_shapes(path: Path) -> Header:
    """Name -> (dtype word of safetensors, shape) of one file, from its header.

    Raises:
        QuantkitError: no whole safetensors file, or one of a type whose size is not known.
    """
    try:
        found = headers.header(path, within=path.parent)
    except FileNotFoundError:
        raise QuantkitError(f"{path} is not there: download or write it again") from None
    unknown = sorted({dtype for dtype, _ in found.values()} - _DTYPE_BITS.keys())
    if unknown:
        raise QuantkitError(
            f"{path} holds tensors of type {', '.join(unknown)}: only {', '.join(_DTYPE_BITS)} are known here"
        )
    return found


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _DTYPE_BITS[dtype] // 8


def _cache_bytes_per_head(config: Mapping[str, Any], dtype: str) -> int:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return head_dim * KINDS[dtype].bytes + KINDS[dtype].scale_bytes
