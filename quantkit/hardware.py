"""What this machine's processor multiplies fast, and what vLLM's CPU build finds no kernels for on it."""

import ctypes
import functools
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 64 << 20  # what is larger is given back: its pages cost little beside the work on them


def compute_dtype(device: str) -> "torch.dtype":
    """The fastest type that has float32's range: bfloat16 where it is multiplied in hardware, else float32.

    Without such instructions bfloat16 is emulated: on an AVX2 processor its matrix products were seen to take seven
    times as long as float32's, with AVX512-BF16 a fifth.
    """
    import torch

    if device != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _cpu_has("avx512_bf16", "amx_bf16", "bf16") else torch.float32


def keep_freed_memory() -> None:
    """Have the C library keep large blocks that are freed for the next request instead of giving them back.

    Tensors come and go by the megabyte; by default each is mapped anew and every page of it faulted in and zeroed: a
    fifth of the CPU time of a forward pass of a small model. Only glibc is told; elsewhere nothing happens.
    """
    if _is_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back_freed_memory() -> None:
    """Have the C library give back now what it kept."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def lacks_avx512() -> bool:
    """Whether this is x86 without AVX-512, for which vLLM's CPU build has neither 4-bit kernels nor an FP8 cache."""
    return _capabilities().get("architecture") == "x86_64" and not _cpu_has("avx512_f")


def allow_amx() -> None:
    """Ask Linux for AMX's registers, where the processor has them: without that their first use is an illegal one."""
    import torch

    if _cpu_has("amx_tile", "amx_bf16", "amx_int8"):
        torch.cpu._init_amx()


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _cpu_has(*names: str) -> bool:
    return any(_capabilities().get(name, False) for name in names)


@functools.cache
def _capabilities() -> "dict[str, object]":
    import torch

    return dict(torch.cpu.get_capabilities())
