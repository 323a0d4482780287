"""Seconds of a pass by the roofline: what its bytes take at the memory's bandwidth, or its operations at their peak.

Williams et al., "Roofline: an insightful visual performance model" (CACM 2009). An estimate, and a bound from below:
nothing reaches its roof, small models least of all, as most of their pass is the start of kernels. A processor of which
matrix products were measured has no roof but these: seconds of its products, and of starting each layer.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from quantkit.architecture import Architecture, linear_shapes, read_architecture
from quantkit.capacity import sizing
from quantkit.errors import raise_all

# What vLLM's CPU build adds to bare kernels, seen side by side on models of 2 and 30 layers of almost no weights
# (docs/plan.md): a layer takes 2.5 times what starting its kernels does (1.6 to 3.2), as they are called through
# modules and custom operators, and a step besides as long as three layers (schedule, inputs, logits, sampling). The
# time that more rows take is the kernels' own, and counts once.
LAYER_OVERHEAD = 2.5
LAYERS_A_STEP = 3


class Measured(BaseModel):
    """What a processor was seen to do: billions of operations a second of products by type and number of rows, and
    microseconds that the kernels of one decoder layer take where it has almost no weights, by number of rows.

    Weights of products are read from memory each time, as in a model that is larger than the caches.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    processor: str
    threads: int
    four_bit_in: str  # the type that 4-bit linears are multiplied in, or `activations`: in theirs
    fp8_cache: bool  # whether vLLM has an FP8 KV cache on it
    inputs: list[int]  # of the linears that were timed
    products: dict[str, dict[int, float]]
    layer_us: dict[int, float]


class Machine(NamedTuple):
    """What an estimate has to know of a machine."""

    name: str
    bytes_per_s: float
    operations_per_s: float
    measured: Measured | None = None


class Reads(NamedTuple):
    """What a pass of a model reads and computes.

    Bytes of weights; operations a token; bytes of cache a token of context; operations of attention a token and token
    of context. What only a processor's estimate asks for: multiplied weights by the type they run in, and layers.
    """

    weight_bytes: int
    token_operations: int
    cache_bytes: int
    attention_operations: int = 0
    products: Mapping[str, int] | None = None
    layers: int = 0


def reads(checkpoint: Path, *, cache_element_bytes: int = 2) -> Reads:
    """From a checkpoint as it is stored. An embedding that is no head too does not count: rows of it are read."""
    arch, problems = read_architecture(sizing.read_config(checkpoint))
    raise_all(problems)
    assert arch is not None
    stored = sizing.weight_bytes(checkpoint)
    if not arch.tied_embeddings:
        stored -= sizing.bytes_of(checkpoint, "model.embed_tokens.weight")
    cache = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * cache_element_bytes
    return Reads(stored, 2 * sum(multiplied(arch)), cache, attention_operations(arch), layers=arch.num_layers)


def multiplied(arch: Architecture) -> tuple[int, int]:
    """Weights that each token is multiplied with: those of all layers' linears, and those of the head."""
    linears = sum(rows * columns for rows, columns in linear_shapes(arch).values())
    return arch.num_layers * linears, arch.vocab_size * arch.hidden_size


def attention_operations(arch: Architecture) -> int:
    """Of one token with one token of its context, all layers: queries with keys, and values by their weights."""
    return 4 * arch.num_layers * arch.num_heads * arch.head_dim


def reads_of_head(head: Path) -> Reads:
    """Of an EAGLE-3 head, all of it 16 bits and multiplied: two bytes and two operations a weight."""
    arch, _ = read_architecture(json.loads((head / "config.json").read_bytes())["transformer_layer_config"])
    assert arch is not None, head
    stored = sum(file.stat().st_size for file in head.glob("*.safetensors"))
    return Reads(stored, stored, 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * 2)


def pass_s(model: Reads, machine: Machine, *, rows: int, sequences: int, context_tokens: int) -> float:
    """Seconds of one pass over `rows` tokens of `sequences` sequences, each with so many tokens in the cache."""
    cache_bytes = sequences * context_tokens * model.cache_bytes
    if machine.measured is not None:
        assert model.products is not None
        alone_us = between(machine.measured.layer_us, 1)
        layer_us = LAYER_OVERHEAD * alone_us + max(between(machine.measured.layer_us, rows) - alone_us, 0)
        layers = (model.layers + LAYERS_A_STEP) * layer_us / 1e6
        products = (
            2 * rows * weights / 1e9 / _rate(machine.measured.products[kind], rows)
            for kind, weights in model.products.items()
        )
        return layers + sum(products) + cache_bytes / machine.bytes_per_s
    operations = rows * (model.token_operations + context_tokens * model.attention_operations)
    return max((model.weight_bytes + cache_bytes) / machine.bytes_per_s, operations / machine.operations_per_s)


def speculative_step_s(
    target: Reads, draft: Reads, machine: Machine, *, sequences: int, tokens: int, context_tokens: int
) -> float:
    """Seconds of a step that drafts `tokens` for each sequence, and has the target verify them.

    vLLM's draft first reads what the last step may have accepted, tokens + 2 a sequence with padding, and then goes on
    token by token.
    """

    def one(model: Reads, rows: int) -> float:
        return pass_s(model, machine, rows=rows, sequences=sequences, context_tokens=context_tokens)

    drafting = one(draft, sequences * (tokens + 2)) + (tokens - 1) * one(draft, sequences)
    return drafting + one(target, sequences * (tokens + 1))


def on_one_rank(model: Reads, ranks: int, cache_bytes: int) -> Reads:
    """What one of `ranks` tensor-parallel ranks reads and computes; `cache_bytes` of its own heads, a token."""
    return model._replace(
        weight_bytes=math.ceil(model.weight_bytes / ranks), token_operations=math.ceil(model.token_operations / ranks),
        attention_operations=math.ceil(model.attention_operations / ranks), cache_bytes=cache_bytes,
    )  # fmt: skip


def between(measured: Mapping[int, float], rows: int) -> float:
    """The value at a number of rows: on the straight line between the neighbours, beyond the last as at the last."""
    points = sorted(measured)
    if rows in measured or not points[0] < rows < points[-1]:
        return measured[min(max(rows, points[0]), points[-1])]
    above = next(point for point in points if point > rows)
    below = points[points.index(above) - 1]
    part = (rows - below) / (above - below)
    return (1 - part) * measured[below] + part * measured[above]


def _rate(measured: Mapping[int, float], rows: int) -> float:
    """Billions of operations a second; between the rows that were measured it is seconds that go in straight lines."""
    if rows > max(measured):
        return measured[max(measured)]
    return rows / between({point: point / rate for point, rate in measured.items()}, rows)
