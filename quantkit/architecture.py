"""The one table of facts on each model family: which tensors a checkpoint holds, their shapes, what feeds what."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# Linears that share an input share a Hessian and an AWQ scale; order is the order of the forward pass.
INPUT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LINEARS = tuple(name for group in INPUT_GROUPS for name in group)


class Family(NamedTuple):
    """What tells one family from another inside the shared pre-norm, gated-MLP, rotary decoder."""

    architecture: str  # config.json's architectures[0]
    qkv_bias: bool = False  # q, k and v always have a bias
    qk_norm: bool = False  # RMSNorm over head_dim on each head's query and key, before the rotation


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
}


class Architecture(NamedTuple):
    """The sizes of one model, read from its config.json."""

    family: Family
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def kv_group(self) -> int:
        """Query heads that share one key/value head (grouped-query attention)."""
        return self.num_heads // self.num_kv_heads


def read_architecture(config: Mapping[str, Any]) -> tuple[Architecture | None, list[str]]:
    """The architecture that a config.json describes, or None with every reason why it is not supported."""
    problems = []
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    names = config.get("architectures") or []
    if family is None or (names and family.architecture not in names):
        supported = ", ".join(f.architecture for f in FAMILIES.values())
        return None, [
            f"config.json: model_type {model_type!r} with architectures {names} is not supported; "
            f"use a checkpoint of {supported}"
        ]
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    for key in needed:
        if not isinstance(config.get(key), int) or config[key] <= 0:
            problems.append(f"config.json: {key} is {config.get(key)!r}; it must be a positive whole number")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"config.json: hidden_act {config['hidden_act']!r} is not supported; only silu is")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config.get("max_position_embeddings", window):
        problems.append(f"config.json: sliding_window {window} is not supported; use a checkpoint with full attention")
    if problems:
        return None, problems
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        return None, [f"config.json: {heads} attention heads do not divide by {kv_heads} key/value heads"]
    return Architecture(
        family=family,
        model_type=model_type,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    ), []


def layer_prefix(layer: int) -> str:
    """The start of the names of a decoder layer's tensors."""
    return f"model.layers.{layer}."


def linear_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """[out_features, in_features] of each linear of a decoder layer, by its name inside the layer."""
    hidden, inner = arch.hidden_size, arch.intermediate_size
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def layer_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a decoder layer, by its name inside the layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (arch.hidden_size,),
        "post_attention_layernorm.weight": (arch.hidden_size,),
    }
    for name, (rows, columns) in linear_shapes(arch).items():
        shapes[f"{name}.weight"] = (rows, columns)
        if _has_bias(arch, name):
            shapes[f"{name}.bias"] = (rows,)
    if arch.family.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (arch.head_dim,)
    return shapes


def _has_bias(arch: Architecture, linear: str) -> bool:
    if linear.startswith("mlp."):
        return arch.mlp_bias
    return arch.attention_bias or (arch.family.qkv_bias and not linear.endswith("o_proj"))


def outer_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor outside the decoder layers; a tied head is not among them."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (arch.vocab_size, arch.hidden_size),
        "model.norm.weight": (arch.hidden_size,),
    }
    if not arch.tied_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, arch.hidden_size)
    return shapes


def all_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that an unquantized checkpoint of this architecture holds, by full name."""
    inside = layer_shapes(arch)
    layers = {layer_prefix(layer) + name: shape for layer in range(arch.num_layers) for name, shape in inside.items()}
    return outer_shapes(arch) | layers
