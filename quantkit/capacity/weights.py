"""In which forms are a model's weights planned, and how many bytes is each?"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.architecture import Architecture, all_shapes, linear_shapes, outer_shapes, read_architecture
from quantkit.capacity import roofline, sizing
from quantkit.capacity.roofline import Machine, Reads
from quantkit.errors import QuantkitError, raise_all

GROUP_SIZES = (128, 64, 32)
QUANTIZED = ("4 bits", "8 bits", "FP8")  # types of linears that are not multiplied as they are stored, but FP8
_TYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
}
_EMBEDDING = "model.embed_tokens.weight"


class Model(NamedTuple):
    """What a plan knows of a model: config.json and, where the weights are there, what their headers say."""

    name: str
    config: dict[str, Any]
    arch: Architecture
    checkpoint: Path | None = None

    @property
    def quantized(self) -> bool:
        """Whether its weights are stored in fewer bits already."""
        return bool(self.config.get("quantization_config"))


class Weights(NamedTuple):
    """One form of a model's weights.

    name: in words; linears: the type of the decoder layers' linears, `4 bits` among them; others: of all else.
    stored_bytes: of all tensors; read_bytes: of those that each pass reads, which an embedding that is no head is not.
    """

    name: str
    linears: str
    others: str
    stored_bytes: int
    read_bytes: int


def open_model(path: Path) -> Model:
    """A checkpoint directory, or one with config.json alone.

    Raises:
        QuantkitError: no config.json, or of a family that is not supported.
    """
    config = sizing.read_config(path)
    held = any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file()
    return described(path.resolve().name, config, path if held else None)


def described(name: str, config: dict[str, Any], checkpoint: Path | None = None) -> Model:
    """A model by its config.json."""
    arch, problems = read_architecture(config)
    raise_all([f"{name}: {problem}" for problem in problems])
    assert arch is not None
    return Model(name, config, arch, checkpoint)


def elements(arch: Architecture) -> int:
    """Weights of a model, all tensors."""
    return sum(math.prod(shape) for shape in all_shapes(arch).values())


def as_stored(model: Model) -> Weights:
    """As the checkpoint holds them; without its weights, all of them in the type that config.json names."""
    kind = str(model.config.get("dtype") or model.config.get("torch_dtype") or "float16")
    others = kind if kind in ("float32", "bfloat16") else "float16"
    if model.checkpoint is None:
        if model.quantized:
            raise QuantkitError(
                f"{model.name}: config.json has a quantization_config and the weights are not there: give the whole "
                "checkpoint, or the config.json of the original"
            )
        others = "float16" if others == "float32" else others
        count = elements(model.arch)
        embedding = 0 if model.arch.tied_embeddings else math.prod(outer_shapes(model.arch)[_EMBEDDING])
        return Weights(f"{others}, by config.json", others, others, 2 * count, 2 * (count - embedding))
    stored = sizing.weight_bytes(model.checkpoint)
    read = stored if model.arch.tied_embeddings else stored - sizing.bytes_of(model.checkpoint, _EMBEDDING)
    if model.quantized:
        linears = _quantized_type(model.config["quantization_config"])
        return Weights(f"{linears}, as stored", linears, others, stored, read)
    if others == "float32":  # vLLM's dtype auto casts it
        return Weights("float32, served as float16", "float16", "float16", stored // 2, read // 2)
    return Weights(f"{others}, as stored", others, others, stored, read)


def at_4_bits(model: Model, group_sizes: Sequence[int] = GROUP_SIZES) -> Weights:
    """As `quantkit quantize` would store them: 4-bit linears, a 16-bit scale and a 4-bit zero point a group.

    Embedding, head and norms keep 16 bits. The group is the first of those given that divides every linear's
    inputs.

    Raises:
        QuantkitError: no group size divides.
    """
    shapes = linear_shapes(model.arch).values()
    group = next((size for size in group_sizes if all(columns % size == 0 for _, columns in shapes)), None)
    if group is None:
        raise QuantkitError(f"{model.name}: no group of {', '.join(map(str, group_sizes))} divides its linears' inputs")
    packed = sum(rows * columns // 2 + rows * (columns // group) * 2 + rows * (columns // group) // 2
                 for rows, columns in shapes)  # fmt: skip
    linears = model.arch.num_layers * packed
    left = 2 * (elements(model.arch) - roofline.multiplied(model.arch)[0])
    embedding = 0 if model.arch.tied_embeddings else 2 * math.prod(outer_shapes(model.arch)[_EMBEDDING])
    return Weights(f"4 bits, groups of {group}", "4 bits", "float16", linears + left, linears + left - embedding)


def held_bytes(weights: Weights, model: Model, machine: Machine, dtype: str) -> int:
    """Bytes in memory: as stored, but for a processor, which holds them in the type that it multiplies in."""
    packed = (
        weights.linears in QUANTIZED and machine.measured is not None and machine.measured.four_bit_in == "activations"
    )
    if machine.measured is None or packed:
        return weights.stored_bytes
    linears = roofline.multiplied(model.arch)[0]
    others = elements(model.arch) - linears
    in_type, other_type = computed_in(weights, machine, dtype)
    return linears * _TYPE_BYTES.get(in_type, 2) + others * _TYPE_BYTES[other_type]


def computed_in(weights: Weights, machine: Machine, dtype: str) -> tuple[str, str]:
    """The types that a processor multiplies linears and head in."""
    assert machine.measured is not None
    four = machine.measured.four_bit_in
    linears = dtype if weights.linears not in QUANTIZED or four == "activations" else four
    return linears, dtype


def reads(weights: Weights, model: Model, machine: Machine, *, cache_bytes: int, dtype: str) -> Reads:
    """What a pass over the model in this form reads and computes; `cache_bytes` a token of context."""
    linears, head = roofline.multiplied(model.arch)
    products: dict[str, int] | None = None
    if machine.measured is not None:
        in_type, head_type = computed_in(weights, machine, dtype)
        products = {in_type: linears, head_type: head} if in_type != head_type else {in_type: linears + head}
    operations = roofline.attention_operations(model.arch)
    return Reads(weights.read_bytes, 2 * (linears + head), cache_bytes, operations, products, model.arch.num_layers)


def _quantized_type(quantization: dict[str, Any]) -> str:
    """`4 bits`, `8 bits` or `FP8`, by what the methods call it."""
    groups = quantization.get("config_groups") or {}
    weights = next((group.get("weights") or {} for group in groups.values()), {})
    bits = quantization.get("bits") or quantization.get("w_bit") or weights.get("num_bits") or 8
    if quantization.get("quant_method") == "fp8" or weights.get("type") == "float":
        return "FP8"
    return f"{bits} bits"
