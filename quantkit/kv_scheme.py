"""Types of KV cache, and the scales of an FP8 one in a checkpoint: what config.json promises, and who keeps it."""

from collections.abc import Container, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from quantkit.architecture import layer_prefix

KvCacheType = Literal[
    "auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head"
]  # fmt: skip


class Kind(NamedTuple):
    """A type of cache.

    bytes: of an element; scale_bytes: of what stands beside a token's key in each head, and beside its value.
    scales: whether it divides by what a checkpoint brings (or by 1.0), and asks with queries that are divided, too.
    """

    bytes: int
    scale_bytes: int = 0
    scales: bool = False


KINDS = {
    "float32": Kind(4), "float16": Kind(2), "bfloat16": Kind(2), "fp8": Kind(1, scales=True),
    "fp8_e4m3": Kind(1, scales=True), "fp8_e5m2": Kind(1), "fp8_per_token_head": Kind(1, scale_bytes=4),
    "int8_per_token_head": Kind(1, scale_bytes=4),
}  # fmt: skip


def has_kv_scheme(config: Mapping[str, Any]) -> bool:
    """Whether config.json promises scales of an FP8 KV cache, which vLLM then uses without being told."""
    return bool((config.get("quantization_config") or {}).get("kv_cache_scheme"))


def kv_scale_name(names: Container[str], index: int, which: str) -> str | None:
    """The tensor with a layer's scale of q, k or v, by either of the names that vLLM knows it under."""
    prefix = f"{layer_prefix(index)}self_attn."
    places = (f"{prefix}{which}_scale", f"{prefix}{which}_proj.{which}_scale")
    return next((place for place in places if place in names), None)


def kv_scale_problems(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """KV scales that config.json promises and the files lack: vLLM takes 1.0 for them without a word."""
    if not has_kv_scheme(config):
        return []
    names = set(names)
    missing = [
        f"{layer_prefix(index)}self_attn.{which}_scale"
        for index in range(int(config["num_hidden_layers"]))
        for which in "kv"
        if kv_scale_name(names, index, which) is None
    ]
    if not missing:
        return []
    return [
        f"config.json has a kv_cache_scheme and {len(missing)} scales are missing ({missing[0]}, ...), which vLLM "
        "would take for 1.0: calibrate the KV cache (quantize --kv-cache fp8), or remove the scheme"
    ]
