"""What does this machine's processor do: its matrix products as vLLM runs them, and the start of a layer's kernels.

A processor has no one roof. Types that it does not multiply in hardware are emulated, at a rate that hardly grows with
the rows; a few rows take several times as long as one; and each layer starts some twenty kernels from Python, which is
a third of a small model's step. So all three are timed, in seconds, on the threads that vLLM computes with. Seconds are
those that the calling thread computed: other work on the machine does not count. Products are timed at the model's own
widths: float32 products of one row with 2048 inputs were seen to run at twice the rate of those with 576.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from quantkit import hardware, provenance
from quantkit.architecture import INPUT_GROUPS, Architecture, linear_shapes
from quantkit.capacity.machines import Gpu
from quantkit.capacity.roofline import Measured

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MATRIX_WEIGHTS = 2 << 20  # at most, of a matrix that is multiplied; its inputs are those of the model's linears
_WEIGHTS = 64 << 20  # of all of them: more than the last cache holds
_ROWS = (1, 2, 4, 8, 16, 64, 256)  # a decode step's, a verifying step's, a prompt's
_FEW_ROWS = 8  # up to here the time of a product is that of reading its matrix
_ROUNDS = 5
_LAYERS = 12


class _Layer(NamedTuple):
    """Weights of a decoder layer that is nearly all start of kernels."""

    qkv: "Tensor"
    o: "Tensor"
    gate_up: "Tensor"
    down: "Tensor"
    norm: "Tensor"


def default_threads() -> int:
    """Threads that vLLM's CPU worker computes with: it leaves one core to the rest of the server."""
    return max((os.cpu_count() or 2) - 1, 1)


def processor(arch: Architecture, *, dtype: str = "bfloat16", threads: int | None = None) -> Gpu:
    """Measure this processor for a model's widths and activations of a type; takes some seconds."""
    import torch

    threads = threads or default_threads()
    lacking = hardware.lacks_avx512()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            kinds = {dtype, "float32"} if lacking else {dtype}  # 4-bit linears are float32 there
            shapes = _shapes(arch)
            rates = {kind: _products(getattr(torch, kind), shapes) for kind in sorted(kinds)}
            layer_us = _layer_us(getattr(torch, dtype))
            bandwidth = _bytes_per_s()
    finally:
        torch.set_num_threads(before)
    name = str(provenance.machine()["processor"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu(
        title=f"this processor ({name})", memory_mib=memory >> 20, bandwidth_gb_s=_short(bandwidth / 1e9),
        bf16_tflops=_short(max(rates[dtype].values()) / 1e3), gpus_per_node=1,
        measured=Measured(
            processor=name, threads=threads, four_bit_in="float32" if lacking else "activations",
            fp8_cache=not lacking, inputs=sorted({columns for _, columns in shapes}), products=rates, layer_us=layer_us,
        ),
    )  # fmt: skip


def _shapes(arch: Architecture) -> list[tuple[int, int]]:
    """[outputs, inputs] of the matrices: a layer's linears as vLLM joins them, cut to size, layer after layer."""
    joined = []
    for group in INPUT_GROUPS:
        shapes = [linear_shapes(arch)[name] for name in group]
        columns = shapes[0][1]
        joined.append((min(sum(rows for rows, _ in shapes), max(_MATRIX_WEIGHTS // columns, 1)), columns))
    weights = sum(rows * columns for rows, columns in joined)
    return joined * -(-_WEIGHTS // weights)


def _products(dtype: "torch.dtype", shapes: Sequence[tuple[int, int]]) -> dict[int, float]:
    """Billions of operations a second of x W^T, by rows of x."""
    import torch

    whole = torch.randn(_MATRIX_WEIGHTS).to(dtype)
    laid_out, multiply = _linear(dtype)
    matrices = [laid_out(whole[: rows * columns].clone().view(rows, columns)) for rows, columns in shapes]
    widest = max(columns for _, columns in shapes)
    inputs = {rows: torch.randn(rows, widest).to(dtype) for rows in _ROWS}
    seconds: dict[int, list[float]] = {rows: [] for rows in _ROWS}
    for number in range(_ROUNDS):
        for rows, x in inputs.items():
            if number and rows > _FEW_ROWS and sum(seconds[rows]) > 0.2:
                continue  # long enough to be sure of
            used = matrices if rows <= _FEW_ROWS else matrices[: max(len(matrices) * _FEW_ROWS // rows, 4)]
            pairs = [(x[:, : matrix.shape[1]].contiguous(), matrix) for matrix in used]
            spent = _timed(lambda pairs=pairs: [multiply(*pair) for pair in pairs])  # type: ignore[misc]
            seconds[rows].append(spent / sum(matrix.numel() for matrix in used))
    return {rows: _short(2 * rows / statistics.median(found) / 1e9) for rows, found in seconds.items()}


def _linear(dtype: "torch.dtype") -> "tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]":
    """How vLLM keeps a matrix, and x W^T of it.

    Where the processor has bfloat16, it lays such weights out for oneDNN once: with AMX, eight rows then take 0.6 of
    the time in which each product does so again.
    """
    import torch

    onednn = torch.ops.mkldnn
    if dtype != torch.bfloat16 or not onednn._is_mkldnn_bf16_supported():
        return lambda matrix: matrix, torch.nn.functional.linear
    return onednn._reorder_linear_weight, lambda x, matrix: onednn._linear_pointwise(x, matrix, None, "none", [], "")


def _layer_us(dtype: "torch.dtype") -> dict[int, float]:
    """Microseconds a decoder layer of almost no weights, by rows: what starting its kernels takes."""
    import torch

    hidden = 32
    sizes = ((3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 2 * hidden))
    layers = []
    for _ in range(_LAYERS):
        qkv, o, gate_up, down = (torch.randn(size).to(dtype) for size in sizes)
        layers.append(_Layer(qkv, o, gate_up, down, norm=torch.ones(hidden, dtype=dtype)))
    cache, rotary = torch.randn(1, 1, 64, 32).to(dtype), torch.randn(1, 32).to(dtype)
    found: dict[int, float] = {}
    for rows in (1, 8, 64):
        x = torch.randn(rows, hidden).to(dtype)

        def through(x: "Tensor" = x) -> None:
            for each in layers:
                x = _through(each, x, cache, rotary)

        through()
        spent = [_timed(through) / _LAYERS for _ in range(3 * _ROUNDS)]
        found[rows] = _short(statistics.median(spent) * 1e6)
    return found


def _through(layer: _Layer, x: "Tensor", cache: "Tensor", rotary: "Tensor") -> "Tensor":
    """What a decoder layer starts: two norms, four linears, rotations, cache, attention, gate, residuals.

    Norms are written out in float32 with the residual added, as vLLM's CPU build runs them.
    """
    import torch
    from torch.nn import functional as F

    def normed(x: "Tensor", residual: "Tensor") -> tuple["Tensor", "Tensor"]:
        wide = x.float() + residual.float()
        kept = wide.to(x.dtype)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.to(x.dtype) * layer.norm, kept

    def rotated(heads: "Tensor") -> "Tensor":
        first, second = heads.chunk(2, -1)
        return heads * rotary + torch.cat((-second, first), -1) * rotary

    hidden = x.shape[-1]
    seen, residual = normed(x, x)
    query, key, value = F.linear(seen, layer.qkv).chunk(3, -1)
    query, key = rotated(query.view(-1, 1, 32)), rotated(key.view(-1, 1, 32))
    cache[:, :, 40] = key[:1].transpose(0, 1)
    cache[:, :, 41] = value[:1]
    held = cache[:, :, :42]
    context = F.scaled_dot_product_attention(query.transpose(0, 1)[None], held, held)
    seen, residual = normed(F.linear(context[0].transpose(0, 1).reshape(-1, hidden), layer.o), residual)
    gate, up = F.linear(seen, layer.gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, layer.down) + residual


def _bytes_per_s() -> float:
    """Of reading memory in order."""
    import torch

    read = torch.ones(64 << 20)
    torch.sum(read)
    return read.numel() * read.element_size() / statistics.median(_timed(lambda: torch.sum(read)) for _ in range(5))


def _timed(work: Callable[[], object]) -> float:
    begin_s = time.thread_time()
    work()
    return time.thread_time() - begin_s


def _short(value: float) -> float:
    return float(f"{value:.4g}")
