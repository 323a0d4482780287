"""The curvature of the loss at a linear's outputs: what was measured against what it is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit import decoder, tokens
from quantkit.architecture import linear_shapes
from quantkit.checkpoint import open_checkpoint
from quantkit.losses import curvature_probe
from quantkit.progress import Report, silent
from quantkit.quantize import fisher
from quantkit.tokens import TokenSet


@pytest.fixture(scope="module")
def windows(tiny_llama: Path, texts: tuple[Path, Path]) -> TokenSet:
    return tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=12, length=64, seed=0)


def _measure(model: Path, ids_ST: Tensor, folder: Path, begin: int = 0, report: Report = silent) -> None:
    folder.mkdir(exist_ok=True)
    source = open_checkpoint(model)
    kind = {"device": "cpu", "dtype": torch.float32}
    fisher.measure(source, ids_ST, folder=folder, own=folder, begin=begin, report=report, **kind)  # type: ignore[arg-type]


def test_probes_have_the_curvature_of_the_kl() -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0])
    probes = curvature_probe(logits.expand(200_000, 4), torch.Generator().manual_seed(0))
    found = probes.T @ probes / len(probes)
    hessian = torch.func.hessian(lambda draft: (logits.softmax(0) * -draft.log_softmax(0)).sum())(logits)
    torch.testing.assert_close(found, hessian, atol=3e-3, rtol=0)
    assert probes.sum(-1).abs().max() < 1e-5


def test_the_last_linear_against_the_exact_curvature(tiny_llama: Path, windows: TokenSet, tmp_path: Path) -> None:
    """What the last down_proj gives reaches the logits of its own position alone: J^T (diag p - p p^T) J."""
    source = open_checkpoint(tiny_llama)
    arch, outer = source.arch, source.outer()
    rotary = decoder.rotation(source.config, 64, dtype=torch.float32, device="cpu")
    hidden = outer["model.embed_tokens.weight"][windows.input_ids_ST]
    for index in range(arch.num_layers):
        hidden = decoder.layer(source.layer(index), arch, hidden, rotary)

    def logits(hidden_C: Tensor) -> Tensor:
        return decoder.head(outer, arch, hidden_C)

    exact = torch.zeros(arch.hidden_size, arch.hidden_size)
    states = hidden.flatten(0, 1)
    for hidden_C in states:
        jacobian = torch.func.jacrev(logits)(hidden_C)
        likely = logits(hidden_C).softmax(-1)
        exact += jacobian.T @ (torch.diag(likely) - likely[:, None] * likely) @ jacobian / len(states)
    many = windows.input_ids_ST.repeat(10, 1)  # a window's probes differ each time: they average out
    _measure(tiny_llama, many, tmp_path / "layers")
    folder = tmp_path / "layers"
    measured = fisher.read(folder, folder, arch.num_layers - 1, torch.device("cpu"))
    (found,) = measured.blocks["mlp.down_proj"]
    assert (found - exact).norm() < 0.15 * exact.norm()
    assert abs(found.trace() / exact.trace() - 1) < 0.02


def test_every_linear_has_its_blocks(
    tiny_llama: Path, windows: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are pieces of one matrix, whatever their size; what is there is not measured again."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    _measure(tiny_llama, windows.input_ids_ST, whole)
    monkeypatch.setattr(fisher, "MAX_ROWS", 24)
    _measure(tiny_llama, windows.input_ids_ST, pieces)
    arch = open_checkpoint(tiny_llama).arch
    for index in range(arch.num_layers):
        one, many = (fisher.read(folder, folder, index, torch.device("cpu")).blocks for folder in (whole, pieces))
        assert one.keys() == many.keys() == linear_shapes(arch).keys()
        for name, (full,) in one.items():
            assert torch.equal(full, full.T)
            assert torch.linalg.eigvalsh(full).min() > -1e-5 * full.diagonal().max()
            begin = 0
            for block in many[name]:
                stop = begin + len(block)
                torch.testing.assert_close(
                    block, full[begin:stop, begin:stop], rtol=1e-4, atol=1e-6 * float(full.max())
                )
                begin = stop
            assert begin == len(full)
    assert not list(whole.glob("scratch-*"))

    def never(what: str, done: int, total: int) -> None:
        raise AssertionError("measured again")

    fisher.drop(whole, whole, 0)
    _measure(tiny_llama, windows.input_ids_ST, whole, begin=1, report=never)
