"""The one table of facts on each model family: which tensors a checkpoint holds, their shapes, what feeds what."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
    model_type = str(config.get("model_type"))[:100]
    family = FAMILIES.get(model_type)
    names = config.get("architectures") or []
    if not isinstance(names, list):
        return None, [f"config.json: architectures is {str(names)[:100]!r}: it must be a list of names"]
    if family is None or (names and family.architecture not in names):
        supported = ", ".join(f.architecture for f in FAMILIES.values())
        return None, [
            f"config.json: model_type {model_type!r} with architectures {str(names)[:100]} is not supported; "
            f"use a checkpoint of {supported}"
        ]
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    problems += [
        f"config.json: {key} is None; it must be a positive whole number" for key in needed if config.get(key) is None
    ]
    problems += [f"config.json: {problem}" for problem in size_problems(config)]
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"config.json: hidden_act {str(config['hidden_act'])[:100]!r} is not supported; only silu is")
    if problems:
        return None, problems
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config.get("max_position_embeddings", window):
        problems.append(f"config.json: sliding_window {window} is not supported; use a checkpoint with full attention")
    if problems:
        return None, problems
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        return None, [f"config.json: {heads} attention heads do not divide by {kv_heads} key/value heads"]
    if not config.get("head_dim") and config["hidden_size"] < heads:
        return None, [f"config.json: hidden_size {config['hidden_size']} is less than its {heads} attention heads"]
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
        max_position_embeddings=config.get("max_position_embeddings") or 2048,
        norm_epsilon=1e-6 if config.get("rms_norm_eps") is None else config["rms_norm_eps"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    ), []


class _Sizes(BaseModel):
    """The sizes in a config.json, each up to ten times that of the largest model there is: what is made of them, lists
    of names among it, is made in memory."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    num_hidden_layers: Annotated[int, Field(gt=0, le=2_000)] | None = None
    hidden_size: Annotated[int, Field(gt=0, le=1 << 18)] | None = None
    intermediate_size: Annotated[int, Field(gt=0, le=1 << 20)] | None = None
    num_attention_heads: Annotated[int, Field(gt=0, le=1 << 12)] | None = None
    num_key_value_heads: Annotated[int, Field(ge=0, le=1 << 12)] | None = None
    head_dim: Annotated[int, Field(ge=0, le=1 << 12)] | None = None
    vocab_size: Annotated[int, Field(gt=0, le=1 << 22)] | None = None
    max_position_embeddings: Annotated[int, Field(gt=0, le=1 << 30)] | None = None
    sliding_window: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    rms_norm_eps: Annotated[float, Field(ge=0, le=1)] | None = None
    num_labels: Annotated[int, Field(ge=0, le=1_000)] | None = None  # transformers makes a table of them


def size_problems(config: Mapping[str, Any]) -> list[str]:
    """Sizes in a config.json that are no positive whole numbers, or beyond any model's; those left out are none."""
    try:
        _Sizes.model_validate(dict(config))
    except ValidationError as error:
        return [
            f"{each['loc'][0]} is {str(each['input'])[:100]!r}; it must be "
            + {
                "less_than_equal": f"at most {(each.get('ctx') or {}).get('le')}",
                "float_type": "a number", "finite_number": "a number",
            }.get(each["type"], "a positive whole number")
            for each in error.errors(include_url=False)
        ]  # fmt: skip
    return []


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
