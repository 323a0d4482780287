"""Which bits: how each format stores integers, scales and zero points, and what vLLM 0.32 will not load.

All three pack 32 // bits integers into an int32, little end first. They differ in the axis that is packed, in
the order within an int32, and in how zero points are written:

| format             | integers               | order in an int32      | zero points z                  |
|--------------------|------------------------|------------------------|--------------------------------|
| awq                | qweight [I, O/8]       | 0, 2, 4, 6, 1, 3, 5, 7 | qzeros [G, O/8]: z, that order |
| gptq               | qweight [I/8, O]       | 0, 1, ... 7            | qzeros [G, O/8]: z - 1         |
| compressed-tensors | weight_packed [O, I/8] | 0, 1, ... 7            | weight_zero_point [O/8, G]: z  |
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # slot k of an int32 holds column AWQ_ORDER[k] of its eight
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
CPU_MULTIPLE = 32  # vLLM's CPUWNA16LinearKernel


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


class Config(Protocol):
    """Builds the quantization_config of a whole checkpoint."""

    def __call__(self, *, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str]) -> dict[str, object]: ...


class Format(NamedTuple):
    """One way to store a quantized weight.

    pack, unpack: one linear's tensors, named without the linear's prefix.
    config: the checkpoint's quantization_config.
    tensors: the names that every linear has; compressed-tensors adds weight_zero_point when it is asymmetric.
    bits: what vLLM 0.32 loads.
    group_sizes: what it loads, or None for -1 and any even number.
    """

    pack: Callable[[QuantizedWeight], dict[str, Tensor]]
    unpack: Unpack
    config: Config
    tensors: tuple[str, ...]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] | None


def quantization_config(
    format: str, *, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str]
) -> dict[str, object]:
    """What config.json says under "quantization_config".

    group_size: -1 for per channel.
    ignore: the linears left in full precision, "lm_head" among them. AWQ needs at least one and matches them
        as substrings; compressed-tensors matches names, and "re:..." as patterns; GPTQ has no place for them,
        and vLLM goes by which linears have packed tensors in the files. compressed-tensors alone can also
        carry a kv_cache_scheme: put it in the result.

    Raises ValueError for an unknown format, and for AWQ without names to ignore.
    """
    return _format(format).config(bits=bits, group_size=group_size, symmetric=symmetric, ignore=ignore)


def read_quantization_config(config: Mapping[str, object]) -> Storage:
    """How a quantization_config, our own or another tool's, says that linears are stored.

    Reads quant_method awq, gptq, compressed-tensors and auto-round (in its AWQ and GPTQ packing). group_size
    is -1 for per channel. AWQ is never symmetric: its files hold zero points even where they are all 8.
    Raises ValueError, saying why, for what `FORMATS` cannot unpack.
    """
    readers = {
        "awq": _read_awq,
        "gptq": _read_gptq,
        "compressed-tensors": _read_compressed_tensors,
        "auto-round": _read_auto_round,
        "intel/auto-round": _read_auto_round,
    }
    method = config.get("quant_method")
    if method not in readers:
        raise ValueError(f"quant_method is {method!r}: only {', '.join(readers)} can be read")
    return readers[str(method)](config)


def unpack(storage: Storage, tensors: Mapping[str, Tensor], *, shape: tuple[int, int]) -> QuantizedWeight:
    """One linear's integers and grid from its stored tensors, named without the linear's prefix.

    Raises ValueError when a tensor is missing, or they do not make a weight of `shape` [out_features, in_features].
    """
    format = FORMATS[storage.format]
    missing = [name for name in format.tensors if name not in tensors]
    if missing:
        raise ValueError(f"{storage.format} tensors {', '.join(missing)} are missing")
    quantized = format.unpack(tensors, bits=storage.bits, group_size=storage.group_size)
    if tuple(quantized.integers_OI.shape) != shape:
        raise ValueError(f"the packed weight is {tuple(quantized.integers_OI.shape)}, config.json asks for {shape}")
    return quantized


def unsupported(
    format: str, *, bits: int, group_size: int, symmetric: bool, shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Every reason why vLLM 0.32 would not load such a checkpoint on any device, and what to choose instead.

    shapes: linear name -> (out_features, in_features), of the linears to be quantized.

    What only a CPU refuses is in `cuda_only`, what only a GPU refuses in `cpu_only`. Raises ValueError for an
    unknown format.
    """
    facts = _format(format)
    reasons = []
    if bits not in facts.bits:
        choices = " or ".join(map(str, facts.bits))
        reasons.append(f"{format} with {bits} bits is not loaded by vLLM 0.32: choose {choices} bits")
    if format == "gptq" and not symmetric:
        reasons.append(
            "gptq with zero points (asymmetric) is not loaded by vLLM 0.32: choose a symmetric grid, or the "
            "format awq or compressed-tensors"
        )
    if format == "compressed-tensors" and bits == 8 and not symmetric:
        reasons.append(
            "compressed-tensors with 8 bits and zero points has a kernel on Hopper alone: choose a symmetric grid"
        )
    if facts.group_sizes is not None and group_size not in facts.group_sizes:
        choices = ", ".join(map(str, facts.group_sizes))
        reasons.append(f"{format} with group size {group_size} is not loaded by vLLM 0.32: choose one of {choices}")
    elif group_size != -1 and (group_size < 2 or group_size % 2):
        reasons.append(f"group size {group_size} is not loaded by vLLM 0.32: choose -1 or an even number")
    if group_size > 0:
        reasons += _misfits(shapes, group_size, facts.group_sizes)
    if 32 % bits == 0:
        reasons += _unfilled(format, 32 // bits, symmetric, shapes)
    return reasons


def cuda_only(
    format: str, *, bits: int, group_size: int, symmetric: bool, shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Every reason why a checkpoint that vLLM 0.32 loads on CUDA is not loaded by its CPU build."""
    _format(format)
    shapes = _fused(shapes)
    reasons = []
    if bits == 8:
        reasons.append(f"{format} with 8 bits is loaded on CUDA only, not by vLLM's CPU build: choose 4 bits for a CPU")
    for features, axis in ((0, "out_features"), (1, "in_features")):
        names = [name for name, shape in shapes.items() if shape[features] % CPU_MULTIPLE]
        if names:
            reasons.append(
                f"{axis} {shapes[names[0]][features]} of {_named(names)} is not a multiple of "
                f"{CPU_MULTIPLE}, which vLLM's CPU kernel needs: serve it on CUDA, or leave it unquantized"
            )
    return reasons


def cpu_only(
    format: str, *, bits: int, group_size: int, symmetric: bool, shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Every reason why a checkpoint that vLLM 0.32's CPU build loads has no kernel, or no fast one, on CUDA.

    From vLLM's source, not from a run: its CUDA kernels for these formats take the group sizes of Marlin;
    those of AWQ fall back to slow ones for others, those of compressed-tensors end in an error but for a few
    special cases.
    """
    _format(format)
    if format == "gptq" or group_size in MARLIN_GROUP_SIZES:
        return []
    choices = ", ".join(map(str, MARLIN_GROUP_SIZES))
    if format == "awq":
        return [f"awq with group size {group_size} has no fast kernel on CUDA: choose one of {choices}"]
    return [f"compressed-tensors with group size {group_size} may find no kernel on CUDA: choose one of {choices}"]


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


def _awq_config(*, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str]) -> dict[str, object]:
    if not ignore:
        # vLLM would list the linears with float tensors itself, and take a k_scale for the sign of an
        # unquantized layer.
        raise ValueError('awq needs names in ignore (modules_to_not_convert): give at least "lm_head"')
    patterns = [name for name in ignore if name.startswith("re:")]
    if patterns:
        raise ValueError(f"awq ignores by substring, not by pattern: spell out {', '.join(patterns)}")
    return {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group_size,
        "zero_point": True,  # stored in any case; a symmetric grid has 8 everywhere
        "version": "gemm",
        "modules_to_not_convert": list(ignore),
    }


def _gptq_config(*, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str]) -> dict[str, object]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,  # act_order with static groups leaves nothing to reorder; vLLM refuses true
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


def _compressed_tensors_config(
    *, bits: int, group_size: int, symmetric: bool, ignore: Sequence[str]
) -> dict[str, object]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


FORMATS: dict[str, Format] = {
    "awq": Format(
        pack_awq,
        unpack_awq,
        _awq_config,
        tensors=("qweight", "qzeros", "scales"),
        bits=(4,),
        group_sizes=None,
    ),
    "gptq": Format(
        pack_gptq,
        unpack_gptq,
        _gptq_config,
        tensors=("qweight", "qzeros", "scales", "g_idx"),
        bits=(4, 8),
        group_sizes=MARLIN_GROUP_SIZES,
    ),
    "compressed-tensors": Format(
        pack_compressed_tensors,
        unpack_compressed_tensors,
        _compressed_tensors_config,
        tensors=("weight_packed", "weight_scale", "weight_shape"),
        bits=(4, 8),
        group_sizes=None,
    ),
}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _read_awq(config: Mapping[str, object]) -> Storage:
    # Files of AutoAWQ before transformers read them have w_bit and q_group_size.
    bits = _integer(config, "bits", "w_bit")
    group_size = _integer(config, "group_size", "q_group_size")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"AWQ version is {version!r}: only the packing of gemm can be read")
    if config.get("zero_point", True) is not True:
        raise ValueError("AWQ without zero_point can not be read: quantize with zero_point true")
    return _known("awq", bits, group_size, False)


def _read_gptq(config: Mapping[str, object]) -> Storage:
    bits, group_size = _integer(config, "bits"), _integer(config, "group_size")
    checkpoint_format = config.get("checkpoint_format") or "gptq"
    if checkpoint_format != "gptq":
        raise ValueError(
            f"checkpoint_format is {checkpoint_format!r}: only gptq, with zero points minus one, can be read"
        )
    if config.get("desc_act") and group_size != -1:
        raise ValueError("desc_act with groups can not be read, nor loaded by vLLM 0.32: quantize with static groups")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(str(pattern).startswith("-:") for pattern in dynamic):
        raise ValueError("dynamic gives some linears a scheme of their own: only one scheme for all can be read")
    return _known("gptq", bits, group_size, bool(config.get("sym", True)))


def _read_auto_round(config: Mapping[str, object]) -> Storage:
    packings = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
    packing = config.get("packing_format", "auto_round:auto_gptq")
    if packing not in packings:
        raise ValueError(f"packing_format is {packing!r}: only {', '.join(packings)} can be read")
    if config.get("data_type", "int") != "int":
        raise ValueError(f"data_type is {config['data_type']!r}: only int can be read")
    if config.get("extra_config"):
        raise ValueError("extra_config gives some linears a scheme of their own: only one scheme for all can be read")
    symmetric = bool(config.get("sym", True)) and packings[str(packing)] != "awq"
    return _known(packings[str(packing)], _integer(config, "bits"), _integer(config, "group_size"), symmetric)


def _read_compressed_tensors(config: Mapping[str, object]) -> Storage:
    for key in ("transform_config", "sparsity_config"):
        if config.get(key):
            raise ValueError(f"{key} is set: weights that are transformed or sparse besides can not be read")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError("config_groups is empty: no weights are quantized")
    schemes = {_read_config_group(name, group, config.get("format")) for name, group in groups.items()}
    if len(schemes) > 1:
        raise ValueError(f"config_groups {', '.join(groups)} have several schemes: only one for all can be read")
    bits, group_size, symmetric = schemes.pop()
    return _known("compressed-tensors", bits, group_size, symmetric)


def _read_config_group(name: str, group: object, default_format: object) -> tuple[int, int, bool]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise ValueError(f"{name} quantizes no weights")
    packing = group.get("format") or default_format
    if packing != "pack-quantized":
        raise ValueError(f"the format of {name} is {packing!r}: only pack-quantized can be read")
    if group.get("input_activations") or group.get("output_activations"):
        raise ValueError(f"{name} quantizes activations: only weights can be read")
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise ValueError(f"the weights of {name} are not static integers")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise ValueError(f"actorder of {name} is {weights['actorder']!r}: quantize with actorder weight instead")
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        raise ValueError(f"the strategy of {name} is {strategy!r}: only group and channel can be read")
    group_size = -1 if strategy == "channel" else _integer(weights, "group_size")
    return _integer(weights, "num_bits"), group_size, bool(weights.get("symmetric", True))


def _integer(config: Mapping[str, object], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise ValueError(f"{keys[0]} is {config.get(keys[0])!r}: expected an integer")


def _known(format: str, bits: int, group_size: int, symmetric: bool) -> Storage:
    if bits not in FORMATS[format].bits:
        raise ValueError(f"{format} with {bits} bits can not be read: only {FORMATS[format].bits}")
    if group_size < 1 and group_size != -1:
        raise ValueError(f"group_size is {group_size}: expected -1 or more than 0")
    return Storage(format, bits, group_size, symmetric)


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _fused(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The shapes as vLLM runs them: q, k and v in one linear, gate and up in one."""
    fused_names = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
    fused_names |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
    fused: dict[str, tuple[int, int]] = {}
    for name, (out_features, in_features) in shapes.items():
        parent, dot, part = name.rpartition(".")
        whole = parent + dot + fused_names.get(part, part)
        fused[whole] = (fused.get(whole, (0, 0))[0] + out_features, in_features)
    return fused


def _misfits(shapes: Mapping[str, tuple[int, int]], group_size: int, group_sizes: Iterable[int] | None) -> list[str]:
    """One reason for each in_features that group_size does not divide."""
    by_in_features: dict[int, list[str]] = {}
    for name, (_, in_features) in shapes.items():
        if in_features % group_size:
            by_in_features.setdefault(in_features, []).append(name)
    reasons = []
    for in_features, names in by_in_features.items():
        choices = [size for size in group_sizes or (32, 64, 96, 128, 192, 256) if size > 0 and in_features % size == 0]
        reasons.append(
            f"in_features {in_features} of {_named(names)} is not divisible by group size {group_size}: "
            f"choose {', '.join(map(str, [*choices, -1]))}"
        )
    return reasons


def _unfilled(format: str, slots: int, symmetric: bool, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """One reason for each axis that does not fill its int32s."""
    # AWQ packs out_features, but vLLM packs it anew along in_features. compressed-tensors packs out_features
    # for its zero points alone.
    axes = [(1, "in_features")]
    if format != "compressed-tensors" or not symmetric:
        axes.append((0, "out_features"))
    reasons = []
    for axis, label in axes:
        names = [name for name, shape in shapes.items() if shape[axis] % slots]
        if names:
            reasons.append(
                f"{label} {shapes[names[0]][axis]} of {_named(names)} is not divisible by {slots}, the "
                "integers that fill an int32: leave it unquantized"
            )
    return reasons
