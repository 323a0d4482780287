"""The 4-bit linear that `quantkit.vllm_plugin` brings to vLLM; imported inside vLLM's processes alone."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32


class Float32WNA16LinearKernel(CPUWNA16LinearKernel):  # type: ignore[misc]
    """Dequantizes at load, multiplies in float32, answers in the activations' type.

    It takes the layers that the kernel of the base class takes, in the layout that vLLM hands to it: integers packed
    along the inputs, with the sign-free zero point 8 where there are none.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the packed integers by `weight_float32`, [out_features, in_features]."""
        packed, scales, zeros = self._get_weight_params(layer)
        integers_IO = self._unpacked(packed, packed.input_dim, packed.input_dim)
        scale_GO = scales.data if scales.output_dim == 1 else scales.data.t()
        zero_GO: Tensor | int = 2 ** (self.config.weight_type.size_bits - 1)
        if self.config.zero_points:
            zero_GO = self._unpacked(zeros, 1 - zeros.output_dim, zeros.output_dim).float()[:, None]
        levels_GiO = integers_IO.float().unflatten(0, (scale_GO.shape[0], -1)) - zero_GO
        weight_IO = (levels_GiO * scale_GO.float()[:, None]).flatten(0, 1)
        layer.weight_float32 = torch.nn.Parameter(weight_IO.t().contiguous(), requires_grad=False)
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name is not None:
                setattr(layer, name, None)

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b."""
        wide = None if bias is None else bias.float()
        weight_OI = layer.get_parameter("weight_float32")
        return torch.nn.functional.linear(x.float(), weight_OI, wide).to(x.dtype)

    def _unpacked(self, packed: Any, input_dim: int, packed_dim: int) -> Tensor:
        """int32 [inputs or groups, out_features]."""
        integers: Tensor = unpack_quantized_values_into_int32(packed.data, self.config.weight_type, packed_dim)
        return integers if input_dim == 0 else integers.t()
