"""Scales that learn: toward the original, integers untouched, and after a kill to the same values."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit import decoder, tokens
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.losses import forward_kl
from quantkit.progress import Report, silent
from quantkit.quantize import stream, tune
from quantkit.quantize.layer import Settings
from quantkit.tokens import TokenSet

SETTINGS = Settings.of(
    effort="high", format="compressed-tensors", bits=4, group_size=32, symmetric=False, act_order=True, damping=0.01,
    tuning_epochs=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def windows(tiny_llama: Path, texts: tuple[Path, Path]) -> TokenSet:
    return tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=12, length=64, seed=0)


def _quantize(checkpoint: Checkpoint, windows: TokenSet, folder: Path, report: Report = silent) -> None:
    stream.quantize_layers(checkpoint, windows, SETTINGS, folder=folder, device="cpu", report=silent)
    stream.tune_scales(checkpoint, windows, SETTINGS, folder=folder, seed=0, device="cpu", report=report)


@pytest.fixture(scope="module")
def layers(tiny_llama: Path, windows: TokenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tuned") / "layers"
    _quantize(open_checkpoint(tiny_llama), windows, folder)
    return folder


def _kl(checkpoint: Checkpoint, settings: Settings, layers: Path, windows: TokenSet, out: Path) -> float:
    out.mkdir()
    stream.write_checkpoint(checkpoint, settings, folder=layers, out=out)
    found = [_logits(each, windows) for each in (open_checkpoint(out, quantized=True), checkpoint)]
    return float(forward_kl(*found).mean())


def _logits(checkpoint: Checkpoint, windows: TokenSet) -> torch.Tensor:
    ids, outer = windows.input_ids_ST, checkpoint.outer()
    rotary = decoder.rotation(checkpoint.config, ids.shape[1], dtype=torch.float32, device="cpu")
    hidden = outer["model.embed_tokens.weight"][ids]
    for index in range(checkpoint.arch.num_layers):
        hidden = decoder.layer(checkpoint.layer(index), checkpoint.arch, hidden, rotary)
    return decoder.head(outer, checkpoint.arch, hidden).flatten(0, 1)


def test_the_model_comes_nearer_to_the_original(
    tiny_llama: Path, texts: tuple[Path, Path], windows: TokenSet, layers: Path, tmp_path: Path
) -> None:
    """On text that it never saw too."""
    source = open_checkpoint(tiny_llama)
    unseen = tokens.tokenize([str(texts[1])], tokens.load_tokenizer(tiny_llama), samples=12, length=64, seed=0)
    plain = SETTINGS._replace(tuning_epochs=0)
    for name, judged in (("seen", windows), ("unseen", unseen)):
        before = _kl(source, plain, layers, judged, tmp_path / f"{name}-before")
        after = _kl(source, SETTINGS, layers, judged, tmp_path / f"{name}-after")
        assert after < before, name


def test_integers_and_zero_points_stay(layers: Path) -> None:
    moved = 0
    for index in range(2):
        name = stream.layer_file(layers, index).name
        before, after = load_file(layers / name), load_file(layers / "tuned" / name)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            if key.endswith(("weight_packed", "weight_zero_point", "weight_shape")):
                assert torch.equal(tensor, after[key])
            elif key.endswith("weight_scale"):
                moved += int((tensor != after[key]).sum())
    assert moved


def test_killed_in_an_epoch_and_resumed_gives_the_same_scales(
    tiny_llama: Path, windows: TokenSet, layers: Path, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("tuning") and done > total * 2 / 3:
            raise Killed

    source, again = open_checkpoint(tiny_llama), tmp_path / "layers"
    with pytest.raises(Killed):
        _quantize(source, windows, again, kill)
    assert [path.name for path in (again / "tuned").iterdir()] == ["epoch-002"]
    _quantize(source, windows, again)
    for file in sorted((layers / "tuned").glob("*.safetensors")):
        one, two = load_file(file), load_file(again / "tuned" / file.name)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_gradients_are_those_of_the_whole_model_at_once(
    tiny_llama: Path, windows: TokenSet, layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, taken = open_checkpoint(tiny_llama), {}
    own = tmp_path / "own"
    own.mkdir()
    plan, ids = tune.Plan(batch_size=2), windows.input_ids_ST[:2]
    stored = stream.storages(source.arch, SETTINGS)
    model = tune._Model(source, layers, stored, plan, tuple(ids.shape), own, "cpu", torch.float32)
    monkeypatch.setattr(tune._Leaves, "move", lambda leaves, gradient_P, *rest: taken.update({id(leaves): gradient_P}))
    told = torch.randn(*ids.shape, source.arch.hidden_size, generator=torch.Generator().manual_seed(0))
    model.step(ids, told, 2, 1, 1.0)

    vectors = [leaves.value_P.clone().requires_grad_() for leaves in model._learning()]
    hidden = model.embedding_VC[ids]
    for layer, vector in zip(model.layers, vectors, strict=False):
        hidden = decoder.layer(layer.weights(vector, torch.float32), source.arch, hidden, model.rotary)
    said = decoder.rms_norm(hidden, vectors[-1], source.arch.norm_epsilon) @ model.head_VC.T
    wanted = decoder.rms_norm(told, model.norm_C, source.arch.norm_epsilon) @ model.head_VC.T
    forward_kl(said.flatten(0, 1), wanted.flatten(0, 1)).mean().backward()  # type: ignore[no-untyped-call]
    for leaves, vector in zip(model._learning(), vectors, strict=True):
        assert vector.grad is not None
        torch.testing.assert_close(
            taken[id(leaves)], vector.grad, rtol=1e-3, atol=1e-5 * float(vector.grad.abs().max())
        )
