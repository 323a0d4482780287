"""The float32 kernel against our own dequantized weights, in each layout that vLLM's loaders hand to it."""

import pytest
import torch
from torch import Tensor, nn

from quantkit import formats
from quantkit.formats import Grid, QuantizedWeight

pytestmark = pytest.mark.vllm

OUT, IN, GROUP = 64, 96, 32


def parameter(data: Tensor, **dims: int) -> nn.Parameter:
    """A stand-in for vLLM's parameters, which say which dimension is what."""
    made = nn.Parameter(data.contiguous(), requires_grad=False)
    for name, value in dims.items():
        setattr(made, name, value)
    return made


def layers(quantized: QuantizedWeight) -> dict[str, nn.Module]:
    gptq, stored = formats.pack_gptq(quantized), formats.pack_compressed_tensors(quantized)
    by_inputs, by_outputs = nn.Module(), nn.Module()
    by_inputs.q = parameter(gptq["qweight"], input_dim=0, output_dim=1, packed_dim=0)
    by_inputs.s = parameter(gptq["scales"], input_dim=0, output_dim=1)
    by_inputs.z = parameter(formats.pack_gptq(shifted(quantized))["qzeros"], input_dim=0, output_dim=1, packed_dim=1)
    by_outputs.q = parameter(stored["weight_packed"], input_dim=1, output_dim=0, packed_dim=1)
    by_outputs.s = parameter(stored["weight_scale"], input_dim=1, output_dim=0)
    zeros = stored.get("weight_zero_point", torch.zeros(OUT // 8, IN // GROUP, dtype=torch.int32))
    by_outputs.z = parameter(zeros, input_dim=1, output_dim=0, packed_dim=0)
    return {"gptq": by_inputs, "compressed-tensors": by_outputs}


def shifted(quantized: QuantizedWeight) -> QuantizedWeight:
    """GPTQ's file stores zero points minus one; the kernel is given them as they are."""
    grid = quantized.grid
    return quantized._replace(grid=grid._replace(zero_point_OG=(grid.zero_point_OG + 1) % 16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_it_multiplies_the_dequantized_weights(layout: str, symmetric: bool) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from quantkit.vllm_kernel import Float32WNA16LinearKernel

    generator = torch.Generator().manual_seed(0)
    scale_OG = torch.rand(OUT, IN // GROUP, generator=generator).add(0.5).half().float()
    zero_OG = torch.randint(16, scale_OG.shape, generator=generator, dtype=torch.int32)
    zero_OG = torch.full_like(zero_OG, 8) if symmetric else zero_OG
    integers_OI = torch.randint(16, (OUT, IN), generator=generator, dtype=torch.uint8)
    quantized = QuantizedWeight(integers_OI, Grid(scale_OG, zero_OG, 4, GROUP, symmetric))
    config = MPLinearLayerConfig(
        full_weight_shape=(IN, OUT), partition_weight_shape=(IN, OUT), group_size=GROUP, zero_points=not symmetric,
        weight_type=scalar_types.uint4b8 if symmetric else scalar_types.uint4, act_type=torch.bfloat16,
    )  # fmt: skip
    kernel = object.__new__(Float32WNA16LinearKernel)  # its constructor asks for the processor's platform
    kernel.config, kernel.w_q_name, kernel.w_s_name, kernel.w_zp_name = config, "q", "s", "z"
    layer = layers(quantized)[layout]
    kernel.process_weights_after_loading(layer)
    x_NI = torch.randn(5, IN, generator=generator)
    bias_O = torch.randn(OUT, generator=generator)
    expected = x_NI @ formats.dequantize(quantized).T + bias_O
    torch.testing.assert_close(kernel.apply_weights(layer, x_NI, bias_O), expected)
    assert kernel.apply_weights(layer, x_NI.bfloat16()).dtype == torch.bfloat16
    assert layer.q is None
