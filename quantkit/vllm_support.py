"""What vLLM 0.32 will not load: by format, bits, groups and shapes, with what to choose instead."""

from collections.abc import Iterable, Mapping, Sequence

from quantkit.formats import by_name

MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
CPU_MULTIPLE = 32  # vLLM's CPUWNA16LinearKernel


def unsupported(
    format: str, *, bits: int, group_size: int, symmetric: bool, shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Every reason why vLLM 0.32 would not load such a checkpoint on any device, and what to choose instead.

    shapes: linear name -> (out_features, in_features), of the linears to be quantized.

    What only a CPU refuses is in `cuda_only`, what only a GPU refuses in `cpu_only`. Raises ValueError for an
    unknown format.
    """
    facts = by_name(format)
    group_sizes = MARLIN_GROUP_SIZES if format == "gptq" else None
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
    if group_sizes is not None and group_size not in group_sizes:
        choices = ", ".join(map(str, group_sizes))
        reasons.append(f"{format} with group size {group_size} is not loaded by vLLM 0.32: choose one of {choices}")
    elif group_size != -1 and (group_size < 2 or group_size % 2):
        reasons.append(f"group size {group_size} is not loaded by vLLM 0.32: choose -1 or an even number")
    if group_size > 0:
        reasons += _misfits(shapes, group_size, group_sizes)
    if 32 % bits == 0:
        reasons += _unfilled(format, 32 // bits, symmetric, shapes)
    return reasons


def cuda_only(
    format: str, *, bits: int, group_size: int, symmetric: bool, shapes: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Every reason why a checkpoint that vLLM 0.32 loads on CUDA is not loaded by its CPU build."""
    by_name(format)
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
    by_name(format)
    if format == "gptq" or group_size in MARLIN_GROUP_SIZES:
        return []
    choices = ", ".join(map(str, MARLIN_GROUP_SIZES))
    if format == "awq":
        return [f"awq with group size {group_size} has no fast kernel on CUDA: choose one of {choices}"]
    return [f"compressed-tensors with group size {group_size} may find no kernel on CUDA: choose one of {choices}"]


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
