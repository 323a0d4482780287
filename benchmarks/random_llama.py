"""Checkpoints of random weights in a model's shape, for what depends on the shape alone: seconds and memory."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit import formats, quantization_config
from quantkit.architecture import all_shapes, layer_prefix, linear_shapes, read_architecture
from quantkit.checkpoint import copy_companions, write_weights
from quantkit.formats import Grid, QuantizedWeight
from quantkit.shards import Entry

_FORMAT = "compressed-tensors"


def write(
    model: Path, tokenizer: Path, config: dict[str, object], *, dtype: torch.dtype = torch.float16,
    group_size: int | None = None,
) -> None:  # fmt: skip
    """A checkpoint of this config.json; with a group size its linears hold random 4-bit integers."""
    arch, problems = read_architecture(config)
    assert arch is not None, problems
    generator = torch.Generator().manual_seed(0)
    linears = {f"{layer_prefix(layer)}{name}" for layer in range(arch.num_layers) for name in linear_shapes(arch)}

    def draw(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        return torch.randn(shape, generator=generator).mul_(0.7 / shape[1] ** 0.5).to(dtype)

    def entries() -> Iterator[Entry]:
        for name, shape in all_shapes(arch).items():
            linear = name.removesuffix(".weight")
            if group_size is None or linear not in linears:
                yield Entry(name, dtype, shape, partial(draw, shape))
                continue
            packed = formats.FORMATS[_FORMAT].pack(_integers((shape[0], shape[1]), group_size, generator))
            for part, tensor in packed.items():
                kept: Callable[[], Tensor] = partial(torch.clone, tensor)
                yield Entry(f"{linear}.{part}", tensor.dtype, tuple(tensor.shape), kept)

    model.mkdir(parents=True)
    write_weights(model, entries())
    copy_companions(tokenizer, model)
    if group_size is not None:
        config = config | {
            "quantization_config": quantization_config.build(
                _FORMAT, bits=4, group_size=group_size, symmetric=False, ignore=["lm_head"]
            )
        }
    (model / "config.json").write_text(json.dumps(config))


def _integers(shape: tuple[int, int], group_size: int, generator: torch.Generator) -> QuantizedWeight:
    groups = shape[1] // group_size
    scale_OG = torch.full((shape[0], groups), 0.15 / shape[1] ** 0.5).half().float()
    zero_point_OG = torch.full((shape[0], groups), 8, dtype=torch.int32)
    integers_OI = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(integers_OI, Grid(scale_OG, zero_point_OG, 4, group_size, symmetric=False))
