"""GPTQ files in another tool's loader. vLLM ignores GPTQ's zero points, so it cannot tell a wrong convention."""

from pathlib import Path

import pytest
import torch
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

from quantkit import formats, tokens
from quantkit.architecture import layer_prefix, linear_shapes
from quantkit.checkpoint import open_checkpoint
from quantkit.progress import silent
from quantkit.quantize import stream
from quantkit.quantize.layer import Settings


def _load(stored: dict[str, torch.Tensor], rows: int, columns: int, group_size: int) -> torch.Tensor:
    """The dense weight [O, I] that AutoRound's module for GPTQ files computes with: y = x W^T."""
    module = QuantLinear(4, group_size, columns, rows, bias=False)
    assert stored["g_idx"].tolist() == [index // group_size for index in range(columns)]  # in order: it may be left out
    module.load_state_dict({name: tensor.clone() for name, tensor in stored.items() if name != "g_idx"})
    module.eval()
    with torch.no_grad():
        dense: torch.Tensor = module(torch.eye(columns)).T
    return dense


def test_a_gptq_checkpoint_means_the_same_to_another_tool(
    tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_llama)
    windows = tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=4, length=64, seed=0)
    settings = Settings("gptq", "gptq", 4, 32, symmetric=True, act_order=True, damping=0.01)
    out = tmp_path / "out"
    out.mkdir()
    stream.quantize_layers(source, windows, settings, folder=tmp_path / "layers", device="cpu", report=silent)
    stream.write_checkpoint(source, settings, folder=tmp_path / "layers", out=out)
    result = open_checkpoint(out, quantized=True)
    for linear, (rows, columns) in linear_shapes(result.arch).items():
        start = f"{layer_prefix(1)}{linear}."
        stored = {name.removeprefix(start): t for name, t in result.read(
            name for name in result.shards if name.startswith(start)).items()}  # fmt: skip
        assert torch.allclose(
            _load(stored, rows, columns, 32), result.layer(1)[f"{linear}.weight"], atol=2e-3, rtol=2e-3
        )


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_zero_point_is_read_as_it_was_meant(symmetric: bool) -> None:
    """Asymmetric too, though vLLM would not load it: only there do zero points differ from 8."""
    torch.manual_seed(0)
    grid = formats.Grid(
        scale_OG=(torch.rand(64, 2) + 0.5).half().float(),
        # the v1 convention has no way to say 0: stored as -1, it wraps round
        zero_point_OG=torch.full((64, 2), 8, dtype=torch.int32) if symmetric else torch.randint(1, 16, (64, 2)).int(),
        bits=4,
        group_size=32,
        symmetric=symmetric,
    )
    quantized = formats.QuantizedWeight(torch.randint(0, 16, (64, 64), dtype=torch.uint8), grid)
    loaded = _load(formats.pack_gptq(quantized), 64, 64, 32)
    assert torch.allclose(loaded, formats.dequantize(quantized), atol=2e-2)
    shifted = quantized._replace(grid=grid._replace(zero_point_OG=(grid.zero_point_OG - 1)))
    assert not torch.allclose(loaded, formats.dequantize(shifted), atol=2e-2)
