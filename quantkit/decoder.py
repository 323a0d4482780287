"""The forward pass of one decoder layer in plain tensors, cut where a quantizer must see the inputs of a linear.

transformers' modules would do the same sums; they are written out here because every consumer (streaming
quantization, streaming evaluation) works between two linears, on weights that change while it looks.
Shapes: B samples, T positions, C hidden, H heads, D head_dim. Weights are named as inside a layer. Linears and
attention run in the weights' precision; the residual stream keeps its own, so float32 states pass through bfloat16
weights without being rounded from layer to layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.architecture import Architecture
from quantkit.errors import refusing

Weights = Mapping[str, Tensor]


class Watched(dict[str, Tensor]):
    """Weights whose linears show what they read and what they give, by name, before it goes on."""

    def __init__(self, weights: Weights, show: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__(weights)
        self.show = show


# What of a config.json positions are turned by, and nothing else that transformers would make something of.
_OF_ROTATION = (
    "model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers",
    "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "original_max_position_embeddings",
)  # fmt: skip

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [1, T, D]
# Queries, keys and values, [B, heads, T, D] each, as attention gets them when a KV cache stands between, or is watched.
Cache = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def rotation(config: Mapping[str, Any], length: int, *, dtype: torch.dtype, device: torch.device | str) -> Rotation:
    """Cosines and sines of positions 0..length-1, with the config's rope scaling (transformers knows the kinds)."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    known = {key: config[key] for key in _OF_ROTATION if key in config}
    with refusing("config.json: no rotary embeddings can be made of it", "get the file again"):
        hf_config = AutoConfig.for_model(**known)
        positions = torch.arange(length, device=device)[None]
        cos, sin = LlamaRotaryEmbedding(hf_config).to(device)(torch.zeros(1, dtype=dtype, device=device), positions)
    return cos, sin


def rms_norm(hidden_BTC: Tensor, weight_C: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467), its mean taken in float32."""
    wide = hidden_BTC.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight_C * wide.to(weight_C.dtype)


def linear(weights: Weights, name: str, x_BTI: Tensor) -> Tensor:
    """x W^T + b for the linear of that name, in the weight's precision."""
    weight_OI = weights[f"{name}.weight"]
    output_BTO = F.linear(x_BTI.to(weight_OI.dtype), weight_OI, weights.get(f"{name}.bias"))
    if isinstance(weights, Watched):
        weights.show(name, x_BTI, output_BTO)
    return output_BTO


def attention_input(weights: Weights, arch: Architecture, hidden_BTC: Tensor) -> Tensor:
    """What q_proj, k_proj and v_proj see."""
    return rms_norm(hidden_BTC, weights["input_layernorm.weight"], arch.norm_epsilon)


def keys_and_values(weights: Weights, arch: Architecture, x_BTC: Tensor, rotary: Rotation) -> tuple[Tensor, Tensor]:
    """The rotated keys and the values as a KV cache holds them: [B, kv heads, T, D] each."""
    key = _heads(weights, arch, "k", x_BTC, arch.num_kv_heads)
    value = linear(weights, "self_attn.v_proj", x_BTC).unflatten(-1, (arch.num_kv_heads, -1)).transpose(1, 2)
    return _rotate(key, rotary), value


def attention(
    weights: Weights, arch: Architecture, x_BTC: Tensor, rotary: Rotation, cache: Cache | None = None
) -> Tensor:
    """Causal attention up to, not including, o_proj: what o_proj sees, [B, T, H * D]."""
    query = _rotate(_heads(weights, arch, "q", x_BTC, arch.num_heads), rotary)
    key, value = keys_and_values(weights, arch, x_BTC, rotary)
    if cache is not None:
        query, key, value = cache(query, key, value)
    context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=arch.kv_group > 1)
    return context.transpose(1, 2).flatten(2)


def mlp_input(weights: Weights, arch: Architecture, hidden_BTC: Tensor) -> Tensor:
    """What gate_proj and up_proj see."""
    return rms_norm(hidden_BTC, weights["post_attention_layernorm.weight"], arch.norm_epsilon)


def gated(weights: Weights, x_BTC: Tensor) -> Tensor:
    """silu(gate) * up: what down_proj sees, [B, T, intermediate]."""
    return F.silu(linear(weights, "mlp.gate_proj", x_BTC)) * linear(weights, "mlp.up_proj", x_BTC)


def layer(
    weights: Weights, arch: Architecture, hidden_BTC: Tensor, rotary: Rotation, cache: Cache | None = None
) -> Tensor:
    """A whole decoder layer: [B, T, C] in, [B, T, C] out."""
    context = attention(weights, arch, attention_input(weights, arch, hidden_BTC), rotary, cache)
    hidden_BTC = hidden_BTC + linear(weights, "self_attn.o_proj", context)
    inner = gated(weights, mlp_input(weights, arch, hidden_BTC))
    return hidden_BTC + linear(weights, "mlp.down_proj", inner)


def head(weights: Weights, arch: Architecture, hidden_BTC: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] from the last layer's output; `weights` are those outside the layers."""
    name = "model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight"
    return F.linear(rms_norm(hidden_BTC, weights["model.norm.weight"], arch.norm_epsilon), weights[name])


def _heads(weights: Weights, arch: Architecture, which: str, x_BTC: Tensor, heads: int) -> Tensor:
    projected: Tensor = linear(weights, f"self_attn.{which}_proj", x_BTC).unflatten(-1, (heads, -1))
    if arch.family.qk_norm:
        projected = rms_norm(projected, weights[f"self_attn.{which}_norm.weight"], arch.norm_epsilon)
    return projected.transpose(1, 2)


def _rotate(x_BHTD: Tensor, rotary: Rotation) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves layout as in the Hugging Face checkpoints."""
    cos, sin = (part[:, None] for part in rotary)
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos + torch.cat((-second, first), dim=-1) * sin
