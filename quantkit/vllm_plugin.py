"""A vLLM plugin: 4-bit linears on x86 processors without AVX-512, and what attention layers loaded of KV scales.

vLLM's own CPU kernel is compiled for AVX-512 and newer alone, yet offers itself everywhere and dies at the first token
on the missing operator `cpu_gemm_wna16`. The one here unpacks a linear once, at load, and multiplies in float32: the
numbers of the dequantized weights, at eight times the memory of the packed ones. On processors with AMX, which Linux
gives to a process that asks for it alone, vLLM's kernel does not ask, and dies at the first token of a model whose
linears are all in 4 bits: it is asked for here.

vLLM says of no scale whether it came from the checkpoint or is the 1.0 that stands for a missing one. Where the
variable SCALES_VARIABLE names a folder, each of its processes writes there what its attention layers hold once they are
loaded, before the first token. Every vLLM that runs in an environment where quantkit is installed finds this module by
the entry point `vllm.general_plugins`.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

from quantkit import hardware

SCALES_VARIABLE = "QUANTKIT_LOADED_KV_SCALES"


def register() -> None:
    """Called once in each of vLLM's processes, before it builds a model."""
    if folder := os.environ.get(SCALES_VARIABLE):
        _tell_scales(Path(folder))
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    hardware.allow_amx()
    if not hardware.lacks_avx512():
        return
    from vllm.model_executor.kernels.linear import register_linear_kernel

    from quantkit.vllm_kernel import Float32WNA16LinearKernel

    replaced = "CPUWNA16LinearKernel"
    disabled = [name for name in os.environ.get("VLLM_DISABLED_KERNELS", "").split(",") if name]
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(dict.fromkeys([*disabled, replaced]))
    register_linear_kernel(Float32WNA16LinearKernel, current_platform._enum)


def _tell_scales(folder: Path) -> None:
    """Have each attention layer write its name, its cache's type and its scales to this process's file, a JSON line."""
    from vllm.model_executor.layers.attention import Attention

    load = Attention.process_weights_after_loading
    if hasattr(load, "__wrapped__"):  # register() is called again where processes share an interpreter
        return

    @functools.wraps(load)
    def load_and_tell(self: Any, *arguments: Any, **more: Any) -> None:
        load(self, *arguments, **more)
        told = {"layer": self.layer_name, "cache": self.kv_cache_dtype}
        told |= {which: getattr(self, f"_{which}_scale").flatten().tolist() for which in "qkv"}
        with (folder / f"{os.getpid()}.jsonl").open("a") as stream:
            stream.write(json.dumps(told) + "\n")

    Attention.process_weights_after_loading = load_and_tell
