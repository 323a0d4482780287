"""The loop over layers on a tiny checkpoint on disk: what comes out, killed and resumed, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit import tokens
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.errors import QuantkitError
from quantkit.progress import silent
from quantkit.quantize import gram, layer, stream
from quantkit.quantize.layer import Settings
from quantkit.tokens import TokenSet

SETTINGS = Settings(
    method="gptq", format="compressed-tensors", bits=4, group_size=32, symmetric=False, act_order=True, damping=0.01
)


@pytest.fixture(scope="module")
def windows(tiny_llama: Path, texts: tuple[Path, Path]) -> TokenSet:
    return tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=6, length=64, seed=0)


def _quantize(checkpoint: Checkpoint, windows: TokenSet, settings: Settings, out: Path) -> Checkpoint:
    out.mkdir(exist_ok=True)
    stream.quantize_layers(checkpoint, windows, settings, folder=out / ".layers", device="cpu", report=silent)
    stream.write_checkpoint(checkpoint, settings, folder=out / ".layers", out=out)
    return open_checkpoint(out, quantized=True)


def _logits(checkpoint: Checkpoint, windows: TokenSet) -> torch.Tensor:
    from quantkit.draft.train import build_model

    with torch.no_grad():
        logits: torch.Tensor = build_model(checkpoint, dtype=torch.float32)(windows.input_ids_ST).logits
    return logits.log_softmax(-1)


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize(
    ("format", "symmetric"),
    [("compressed-tensors", False), ("compressed-tensors", True), ("gptq", True), ("awq", False)],
)
def test_every_method_in_every_format_keeps_the_model(
    method: str, format: str, symmetric: bool, tiny_llama: Path, windows: TokenSet, tmp_path: Path
) -> None:
    """Far nearer to the original than with one linear in the wrong place: the packed weights are read back."""
    source = open_checkpoint(tiny_llama)
    settings = SETTINGS._replace(method=method, format=format, symmetric=symmetric, bits=4)
    result = _quantize(source, windows, settings, tmp_path / "out")
    original, quantized = _logits(source, windows), _logits(result, windows)
    kl = (original.exp() * (original - quantized)).sum(-1).mean()
    shuffled = original.roll(1, dims=1)
    far = (original.exp() * (original - shuffled)).sum(-1).mean()
    assert 0 < kl < 0.15 * far
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == format


def test_eight_bits_are_nearly_exact(tiny_llama: Path, windows: TokenSet, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_llama)
    result = _quantize(source, windows, SETTINGS._replace(bits=8), tmp_path / "out")
    original, quantized = _logits(source, windows), _logits(result, windows)
    assert (original.exp() * (original - quantized)).sum(-1).mean() < 5e-3


def test_matrices_of_what_the_model_wrote_are_shrunk_more(
    tiny_llama: Path, windows: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if there were so many fewer tokens: with a measure that is as much shorter, it comes to the same bytes."""
    source = open_checkpoint(tiny_llama)
    written = _quantize(source, windows._replace(written=4), SETTINGS, tmp_path / "written").layer(0)
    given = _quantize(source, windows, SETTINGS, tmp_path / "given").layer(0)
    usual, fewer = layer.usual_shrinkage, (2 + 4 * gram.WRITTEN_COUNTS) / 6
    monkeypatch.setattr(layer, "usual_shrinkage", lambda width, tokens: usual(width, fewer * tokens))
    shrunk = _quantize(source, windows, SETTINGS, tmp_path / "shrunk").layer(0)
    assert all(torch.equal(tensor, shrunk[name]) for name, tensor in written.items())
    assert any(not torch.equal(tensor, given[name]) for name, tensor in written.items())


def test_grouped_query_attention_takes_awq_scales(make_llama, windows: TokenSet, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A value head that feeds two query heads has one scale for both: the dense model before rounding is unchanged."""
    source = open_checkpoint(make_llama(tmp_path / "gqa", heads=4, kv_heads=2))
    settings = SETTINGS._replace(method="awq", bits=8)
    result = _quantize(source, windows, settings, tmp_path / "out")
    original, quantized = _logits(source, windows), _logits(result, windows)
    assert (original.exp() * (original - quantized)).sum(-1).mean() < 5e-3


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
def test_killed_after_any_layer_and_resumed_gives_the_same_bytes(
    method: str, tiny_llama: Path, windows: TokenSet, tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_llama)
    settings = SETTINGS._replace(method=method, drift_correction=0.5 if method == "awq+gptq" else 0.0)
    _quantize(source, windows, settings, tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill_at_second(what: str, done: int, total: int) -> None:
        if done == 1:
            raise KilledError

    folder = tmp_path / "resumed" / ".layers"
    with pytest.raises(KilledError):
        stream.quantize_layers(source, windows, settings, folder=folder, device="cpu", report=kill_at_second)
    first = stream.layer_file(folder, 0)
    made = first.stat().st_mtime_ns
    _quantize(source, windows, settings, tmp_path / "resumed")
    assert first.stat().st_mtime_ns == made, "a finished layer was done again"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_notes_name_each_linear_with_its_error(tiny_llama: Path, windows: TokenSet, tmp_path: Path) -> None:
    notes = stream.quantize_layers(
        open_checkpoint(tiny_llama), windows, SETTINGS, folder=tmp_path / "layers", device="cpu", report=silent
    )
    assert len(notes) == 2 * 7 and notes[0].linear == "model.layers.0.self_attn.q_proj"
    assert all(0 < note.relative_error < 0.1 for note in notes)
    assert all(note.damping > 0 and note.scale_gain is None for note in notes)


def test_embeddings_and_norms_are_carried_over(tiny_llama: Path, windows: TokenSet, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_llama)
    _quantize(source, windows, SETTINGS, tmp_path / "out")
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(before[name].half(), after[name])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "gptq"}, "symmetric"),
        ({"format": "gptq", "symmetric": True, "group_size": 48}, "48"),
        ({"group_size": 96}, "96"),
        ({"format": "awq", "bits": 8}, "8"),
    ],
)
def test_what_vllm_would_not_load_is_refused_with_what_to_choose(
    changes: dict[str, object], expected: str, tiny_llama: Path
) -> None:
    with pytest.raises(QuantkitError, match=expected):
        stream.check_settings(open_checkpoint(tiny_llama), SETTINGS._replace(**changes))  # type: ignore[arg-type]


def test_values_beyond_float16_are_refused() -> None:
    with pytest.raises(QuantkitError, match="beyond float16"):
        stream.half(torch.tensor([1e5]), "model.norm.weight")
