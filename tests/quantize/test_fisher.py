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


def test_what_a_change_costs_is_the_kl_that_it_makes(tiny_llama: Path, windows: TokenSet, tmp_path: Path) -> None:
    """To second order: for changes as small as 8 bits make them, in every linear of both layers."""
    source = open_checkpoint(tiny_llama)
    arch, outer, ids = source.arch, source.outer(), windows.input_ids_ST
    rotary = decoder.rotation(source.config, 64, dtype=torch.float32, device="cpu")

    def changed(weight_OI: Tensor) -> dict[int, Tensor]:
        noise = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(0))
        return {1: 0.02 * weight_OI.std() * noise, 2: 0.04 * weight_OI.std() * noise}

    def logits(changed_layer: int, linear: str) -> Tensor:
        hidden = outer["model.embed_tokens.weight"][ids]
        for index in range(arch.num_layers):
            weights = source.layer(index)
            if index == changed_layer:
                weight = weights[f"{linear}.weight"]
                weights[f"{linear}.weight"] = weight + changed(weight)[1]
            hidden = decoder.layer(weights, arch, hidden, rotary)
        return decoder.head(outer, arch, hidden).double().flatten(0, 1)

    tmp_path.joinpath("layers").mkdir()
    costs = fisher.measure(
        source, ids.repeat(8, 1), folder=tmp_path / "layers", own=tmp_path, begin=0, device="cpu", dtype=torch.float32,
        report=silent, errors=changed,
    )  # fmt: skip
    original = logits(-1, "").log_softmax(-1)
    for index, by_linear in enumerate(costs):
        for linear, cost in by_linear.items():
            moved = logits(index, linear).log_softmax(-1)
            kl = float((original.exp() * (original - moved)).sum(-1).mean())
            assert 0.8 < cost[1] / kl < 1.25, (index, linear)
            assert cost[2] == pytest.approx(4 * cost[1], rel=1e-3)


def test_tokens_weigh_what_their_outputs_matter(tiny_llama: Path, windows: TokenSet, tmp_path: Path) -> None:
    """The last token of a window answers for itself alone; what attention reads before it answers for those behind."""
    folder = tmp_path / "layers"
    _measure(tiny_llama, windows.input_ids_ST.repeat(8, 1), folder)
    found = fisher.read(folder, folder, 0, torch.device("cpu")).tokens
    assert found.keys() == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    for weight_ST in found.values():
        assert weight_ST.shape == (96, 64)
        assert weight_ST.min() >= 0
        assert 0.6 < float(weight_ST.mean()) <= 1.001
    by_position = found["mlp.down_proj"].mean(0)
    assert by_position[:16].mean() > by_position[-16:].mean()


def test_tokens_that_were_not_measured_weigh_what_others_at_their_place_do(
    tiny_llama: Path, windows: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "MAX_TOKENS", 8 * 64)
    folder = tmp_path / "layers"
    _measure(tiny_llama, windows.input_ids_ST, folder)
    for weight_ST in fisher.read(folder, folder, 0, torch.device("cpu")).tokens.values():
        assert weight_ST.shape == (12, 64)
        torch.testing.assert_close(weight_ST[8:], weight_ST[:8].mean(0).expand(4, 64))
        assert not torch.equal(weight_ST[0], weight_ST[1])
