"""A vLLM plugin: 4-bit linears on x86 processors without AVX-512, for which vLLM's CPU build has no kernel.

vLLM's own CPU kernel is compiled for AVX-512 and newer alone, yet offers itself everywhere and dies at the first token
on the missing operator `cpu_gemm_wna16`. The one here unpacks a linear once, at load, and multiplies in float32: the
numbers of the dequantized weights, at eight times the memory of the packed ones. Every vLLM that runs in an environment
where quantkit is installed finds it by the entry point `vllm.general_plugins`; on other processors it does nothing.
"""

import os

from quantkit import hardware


def register() -> None:
    """Called once in each of vLLM's processes, before it builds a model."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not hardware.lacks_avx512():
        return
    from vllm.model_executor.kernels.linear import register_linear_kernel

    from quantkit.vllm_kernel import Float32WNA16LinearKernel

    replaced = "CPUWNA16LinearKernel"
    disabled = [name for name in os.environ.get("VLLM_DISABLED_KERNELS", "").split(",") if name]
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(dict.fromkeys([*disabled, replaced]))
    register_linear_kernel(Float32WNA16LinearKernel, current_platform._enum)
