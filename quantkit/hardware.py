"""What this machine's processor multiplies fast, and what vLLM's CPU build finds no kernels for on it."""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def compute_dtype(device: str) -> "torch.dtype":
    """The fastest type that has float32's range: bfloat16 where it is multiplied in hardware, else float32.

    Without such instructions bfloat16 is emulated: on an AVX2 processor its matrix products were seen to take seven
    times as long as float32's, with AVX512-BF16 a fifth.
    """
    import torch

    if device != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _cpu_has("avx512_bf16", "amx_bf16", "bf16") else torch.float32


def lacks_avx512() -> bool:
    """Whether this is x86 without AVX-512, for which vLLM's CPU build has neither 4-bit kernels nor an FP8 cache."""
    return _capabilities().get("architecture") == "x86_64" and not _cpu_has("avx512_f")


def _cpu_has(*names: str) -> bool:
    return any(_capabilities().get(name, False) for name in names)


@functools.cache
def _capabilities() -> "dict[str, object]":
    import torch

    return dict(torch.cpu.get_capabilities())
