"""Which bits: how each format stores integers, scales and zero points.

All three pack 32 // bits integers into an int32, little end first. They differ in the axis that is packed, in
the order within an int32, and in how zero points are written:

| format             | integers               | order in an int32      | zero points z                  |
|--------------------|------------------------|------------------------|--------------------------------|
| awq                | qweight [I, O/8]       | 0, 2, 4, 6, 1, 3, 5, 7 | qzeros [G, O/8]: z, that order |
| gptq               | qweight [I/8, O]       | 0, 1, ... 7            | qzeros [G, O/8]: z - 1         |
| compressed-tensors | weight_packed [O, I/8] | 0, 1, ... 7            | weight_zero_point [O/8, G]: z  |
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # slot k of an int32 holds column AWQ_ORDER[k] of its eight


class Grid(NamedTuple):
    """The values that each group of a weight may take.

    scale_OG: float32 [out_features, groups], positive, each exactly representable in float16, as all formats
        store it.
    zero_point_OG: int32 [out_features, groups], 0..2**bits - 1, the integer that stands for 0.0.
    bits: 2..8.
    group_size: inputs in a group; in_features for a scale per channel.
    symmetric: every zero point is 2**(bits - 1), and a format may leave it out. It is said here rather than
        read off the zero points, since those of a small asymmetric weight may all be 2**(bits - 1) by chance.
    """

    scale_OG: Tensor
    zero_point_OG: Tensor
    bits: int
    group_size: int
    symmetric: bool


class QuantizedWeight(NamedTuple):
    """integers_OI: uint8 [out_features, in_features], 0..2**bits - 1, unpacked; grid: what they mean."""

    integers_OI: Tensor
    grid: Grid


class Storage(NamedTuple):
    """How a checkpoint's linears are stored: what its quantization_config comes down to. group_size -1: per channel."""

    format: str
    bits: int
    group_size: int
    symmetric: bool


class Storages(NamedTuple):
    """How each linear of a checkpoint is stored."""

    usual: Storage
    special: Mapping[str, Storage | None]  # by full name, where it is not the usual one; None: not quantized

    def of(self, linear: str) -> Storage | None:
        """The storage of the linear of that full name."""
        return self.special.get(linear, self.usual)


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """(integer - zero_point) * scale: float32 [out_features, in_features]."""
    grid = quantized.grid
    levels_OGi = grouped(quantized.integers_OI.float(), grid.group_size)
    weight_OGi = levels_OGi.sub_(grid.zero_point_OG[..., None]).mul_(grid.scale_OG[..., None])
    return weight_OGi.flatten(1)


def grouped(matrix_OI: Tensor, group_size: int) -> Tensor:
    """[O, I] -> [O, groups, group_size], without a copy where that can be."""
    return matrix_OI.reshape(matrix_OI.shape[0], -1, group_size)


def pack_awq(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """AWQ "gemm": qweight int32 [I, O/8], qzeros int32 [G, O/8], scales float16 [G, O]. 4 bit alone.

    Raises ValueError for other bits, out_features that 8 does not divide, or scales that are not float16
    values.
    """
    grid = quantized.grid
    _check_awq_bits(grid.bits)
    return {
        "qweight": _pack(_awq_interleaved(quantized.integers_OI.T), grid.bits, "out_features"),
        "qzeros": _pack(_awq_interleaved(grid.zero_point_OG.T), grid.bits, "out_features"),
        "scales": _float16(grid.scale_OG).T.contiguous(),
    }


def unpack_awq(tensors: Mapping[str, Tensor], *, bits: int, group_size: int) -> QuantizedWeight:
    """The inverse of `pack_awq`. group_size -1 is per channel, here and in the other formats.

    The grid counts as symmetric when all zero points are 8, since AWQ stores them either way.
    """
    _check_awq_bits(bits)
    integers_IO = _awq_restored(_unpack(tensors["qweight"], bits))
    zero_point_GO = _awq_restored(_unpack(tensors["qzeros"], bits))
    return _quantized(integers_IO.T, tensors["scales"].T, zero_point_GO.T, bits, group_size, None)


def pack_gptq(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """GPTQ v1 (checkpoint_format "gptq"): qweight int32 [I/8, O], qzeros int32 [G, O/8], scales float16
    [G, O], g_idx int32 [I]. 8 stands for 32 // bits.

    Raises ValueError for features that do not fill their int32s, or scales that are not float16 values.
    """
    integers_OI, grid = quantized
    in_features = integers_OI.shape[1]
    # GPTQ v1 stores zero_point - 1, and readers add one back. Both keep the low bits alone: in 4 bit, zero
    # point 0 is stored as 15.
    stored_GO = (grid.zero_point_OG.T - 1) % 2**grid.bits
    return {
        "qweight": _pack(integers_OI, grid.bits, "in_features").T.contiguous(),
        "qzeros": _pack(stored_GO, grid.bits, "out_features"),
        "scales": _float16(grid.scale_OG).T.contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32, device=integers_OI.device) // grid.group_size,
    }


def unpack_gptq(tensors: Mapping[str, Tensor], *, bits: int, group_size: int) -> QuantizedWeight:
    """The inverse of `pack_gptq`; g_idx may be missing. Symmetric when all zero points are 2**(bits - 1).

    Raises ValueError when g_idx puts inputs in groups out of order (desc_act): no `Grid` says that.
    """
    integers_OI = _unpack(tensors["qweight"].T, bits)
    in_features = integers_OI.shape[1]
    g_idx = tensors.get("g_idx")
    if g_idx is not None:
        resolved = in_features if group_size == -1 else group_size
        in_order_I = torch.arange(in_features, device=g_idx.device) // resolved
        if not torch.equal(g_idx.long(), in_order_I):
            raise ValueError("g_idx is out of order (desc_act): quantize with static groups instead")
    zero_point_GO = (_unpack(tensors["qzeros"], bits).int() + 1) % 2**bits  # a uint8 would lose 256
    return _quantized(integers_OI, tensors["scales"].T, zero_point_GO.T, bits, group_size, None)


def pack_compressed_tensors(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """compressed-tensors "pack-quantized": weight_packed int32 [O, I/8], weight_scale float16 [O, G],
    weight_shape int64 [2] = (O, I) and, unless symmetric, weight_zero_point int32 [O/8, G]. 8 stands for
    32 // bits.

    Raises ValueError for features that do not fill their int32s, or scales that are not float16 values.
    """
    integers_OI, grid = quantized
    # The format means signed integers and adds 2**(bits - 1) to pack them: these are unsigned already.
    tensors = {
        "weight_packed": _pack(integers_OI, grid.bits, "in_features"),
        "weight_scale": _float16(grid.scale_OG).contiguous(),
        "weight_shape": torch.tensor(integers_OI.shape, dtype=torch.int64),
    }
    if not grid.symmetric:
        packed_GO = _pack(grid.zero_point_OG.T, grid.bits, "out_features")
        tensors["weight_zero_point"] = packed_GO.T.contiguous()
    return tensors


def unpack_compressed_tensors(tensors: Mapping[str, Tensor], *, bits: int, group_size: int) -> QuantizedWeight:
    """The inverse of `pack_compressed_tensors`. Symmetric when there is no weight_zero_point.

    Raises ValueError when weight_g_idx is there (actorder "group"): no `Grid` says that.
    """
    if "weight_g_idx" in tensors:
        raise ValueError("weight_g_idx (actorder group) is not read: quantize with actorder weight instead")
    integers_OI = _unpack(tensors["weight_packed"], bits)
    shape = tuple(tensors["weight_shape"].tolist())
    if shape != tuple(integers_OI.shape):
        raise ValueError(f"weight_shape is {shape}, weight_packed holds {tuple(integers_OI.shape)}")
    scale_OG = tensors["weight_scale"]
    if "weight_zero_point" not in tensors:
        zero_point_OG = torch.full_like(scale_OG, 2 ** (bits - 1), dtype=torch.int32)
        return _quantized(integers_OI, scale_OG, zero_point_OG, bits, group_size, True)
    zero_point_OG = _unpack(tensors["weight_zero_point"].T, bits).T
    return _quantized(integers_OI, scale_OG, zero_point_OG, bits, group_size, False)


class Unpack(Protocol):
    """Reads one linear's tensors, named without the linear's prefix."""

    def __call__(self, tensors: Mapping[str, Tensor], *, bits: int, group_size: int) -> QuantizedWeight: ...


class Format(NamedTuple):
    """One way to store a quantized weight.

    pack, unpack: one linear's tensors, named without the linear's prefix.
    tensors: the names that every linear has; compressed-tensors adds weight_zero_point when it is asymmetric.
    bits: what it stores, of what vLLM 0.32 loads.
    """

    pack: Callable[[QuantizedWeight], dict[str, Tensor]]
    unpack: Unpack
    tensors: tuple[str, ...]
    bits: tuple[int, ...]


FORMATS: dict[str, Format] = {
    "awq": Format(pack_awq, unpack_awq, tensors=("qweight", "qzeros", "scales"), bits=(4,)),
    "gptq": Format(pack_gptq, unpack_gptq, tensors=("qweight", "qzeros", "scales", "g_idx"), bits=(4, 8)),
    "compressed-tensors": Format(
        pack_compressed_tensors,
        unpack_compressed_tensors,
        tensors=("weight_packed", "weight_scale", "weight_shape"),
        bits=(4, 8),
    ),
}


def by_name(name: str) -> Format:
    """The format of that name. Raises ValueError for an unknown one."""
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def unpack(storage: Storage, tensors: Mapping[str, Tensor], *, shape: tuple[int, int]) -> QuantizedWeight:
    """One linear's integers and grid from its stored tensors, named without the linear's prefix.

    Raises ValueError when a tensor is missing, or they do not make a weight of `shape` [out_features, in_features].
    """
    format = by_name(storage.format)
    missing = [name for name in format.tensors if name not in tensors]
    if missing:
        raise ValueError(f"{storage.format} tensors {', '.join(missing)} are missing")
    quantized = format.unpack(tensors, bits=storage.bits, group_size=storage.group_size)
    if tuple(quantized.integers_OI.shape) != shape:
        raise ValueError(f"the packed weight is {tuple(quantized.integers_OI.shape)}, config.json asks for {shape}")
    # vLLM goes by config.json: it would not read these zero points, or wait for such as are not there
    if storage.symmetric and not quantized.grid.symmetric:
        raise ValueError("there are zero points of its own, and config.json says symmetric")
    if storage.format == "compressed-tensors" and quantized.grid.symmetric and not storage.symmetric:
        raise ValueError("weight_zero_point is missing, and config.json says asymmetric")
    return quantized


def _pack(integers: Tensor, bits: int, axis: str) -> Tensor:
    """[m, n] integers in 0..2**bits - 1 -> int32 [m, n * bits / 32], the first in the lowest bits."""
    if bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits do not fill an int32: choose 4 or 8")
    slots = 32 // bits
    if integers.shape[1] % slots:
        raise ValueError(f"{axis} {integers.shape[1]} is not divisible by {slots}, the integers in an int32")
    packed = torch.zeros(integers.shape[0], integers.shape[1] // slots, dtype=torch.int32, device=integers.device)
    for slot in range(slots):
        packed |= integers[:, slot::slots].int() << (bits * slot)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`: uint8 [m, n * 32 / bits]."""
    if packed.dtype != torch.int32 or packed.ndim != 2:
        raise ValueError(f"packed integers are a matrix of int32, not {packed.dtype} {tuple(packed.shape)}")
    slots = 32 // bits
    integers = torch.empty(packed.shape[0], packed.shape[1] * slots, dtype=torch.uint8, device=packed.device)
    for slot in range(slots):
        # >> keeps the sign of an int32; the mask takes it off.
        integers[:, slot::slots] = (packed >> (bits * slot)) & (2**bits - 1)
    return integers


def _awq_interleaved(matrix_xO: Tensor) -> Tensor:
    if matrix_xO.shape[1] % 8:
        raise ValueError(f"out_features {matrix_xO.shape[1]} is not divisible by 8, the integers in an int32")
    return grouped(matrix_xO, 8)[:, :, list(AWQ_ORDER)].flatten(1)


def _awq_restored(matrix_xO: Tensor) -> Tensor:
    slot_of_column = [AWQ_ORDER.index(column) for column in range(8)]
    return grouped(matrix_xO, 8)[:, :, slot_of_column].flatten(1)


def _check_awq_bits(bits: int) -> None:
    if bits != 4:
        raise ValueError(f"the format awq stores 4 bits, not {bits}: choose compressed-tensors or gptq")


def _float16(scale_OG: Tensor) -> Tensor:
    half_OG = scale_OG.half()
    if not torch.equal(half_OG.float(), scale_OG):
        raise ValueError("scales must be values that float16 holds: round them before the integers are chosen")
    return half_OG


def _quantized(
    integers_OI: Tensor,
    scale_OG: Tensor,
    zero_point_OG: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool | None,
) -> QuantizedWeight:
    """Puts unpacked parts together, and checks that they fit each other. symmetric None: by the zero
    points."""
    out_features, in_features = integers_OI.shape
    resolved = in_features if group_size == -1 else group_size
    expected = (out_features, in_features // resolved)
    if in_features % resolved or scale_OG.shape != expected or zero_point_OG.shape != expected:
        raise ValueError(
            f"integers {(out_features, in_features)} in groups of {resolved} do not go with scales "
            f"{tuple(scale_OG.shape)} and zero points {tuple(zero_point_OG.shape)}"
        )
    zero_point_OG = zero_point_OG.int().contiguous()
    if symmetric is None:
        symmetric = bool((zero_point_OG == 2 ** (bits - 1)).all())
    # Another tool's scales may be bfloat16: float32 holds both.
    grid = Grid(scale_OG.float().contiguous(), zero_point_OG, bits, resolved, symmetric)
    return QuantizedWeight(integers_OI.contiguous(), grid)
