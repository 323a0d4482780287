"""Scales from counted magnitudes, against scales found on the values themselves; and what a checkpoint brings."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import kv_cache, quantization_config, tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.errors import QuantkitError
from quantkit.quantize import kv_scales, stream
from quantkit.quantize.kv_scales import KvSettings, Seen
from quantkit.recipe import Quantize, check


def seen(x_BHTD: Tensor) -> Seen:
    found = Seen(x_BHTD.shape[0] * x_BHTD.shape[2], x_BHTD.shape[1])
    found.look(x_BHTD, x_BHTD, x_BHTD)
    return found


@pytest.fixture(scope="module")
def keys() -> Tensor:
    """[2, 2, 256, 32] with a tail; the second head is a hundred times the first."""
    torch.manual_seed(0)
    x_BHTD = torch.randn(2, 2, 256, 32) * torch.randn(2, 2, 256, 32).exp()
    return x_BHTD * torch.tensor([1.0, 100.0])[None, :, None, None]


def test_max_cuts_nothing_off(keys: Tensor) -> None:
    scales, notes = kv_scales.choose(seen(keys), KvSettings("max", "attn_head"))
    assert torch.allclose(scales["k_scale"], keys.abs().amax((0, 2, 3)) / 448)
    assert notes[1].largest == pytest.approx(float(keys.abs().max()))


def test_percentile_is_that_of_the_values(keys: Tensor) -> None:
    scales, _ = kv_scales.choose(seen(keys), KvSettings("percentile"))
    exact = keys.abs().flatten().quantile(0.9999) / 448
    assert float(scales["v_scale"]) == pytest.approx(float(exact), rel=0.05)


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_mse_is_the_least_of_a_search_on_the_values(keys: Tensor, strategy: str) -> None:
    """No scale of a fine search over the values themselves has an error that is a hundredth and a half below it."""
    scales, notes = kv_scales.choose(seen(keys), KvSettings("mse", strategy))  # type: ignore[arg-type]
    for head, scale in enumerate(scales["k_scale"]):
        own = keys if strategy == "tensor" else keys[:, head : head + 1]

        def error(tried: float, own: Tensor = own) -> float:
            return float((kv_cache.e4m3(own, torch.tensor([tried])) - own).square().sum())

        least = min(error(float(own.abs().max()) / 448 * 2 ** (step / 32)) for step in range(-96, 128))
        assert error(float(scale)) <= 1.015 * least
    assert notes[0].error < 1e-3
    assert notes[0].error <= 1.02 * min(notes[0].error_at_one, notes[0].error)


def test_counts_add_up_over_parts(keys: Tensor) -> None:
    whole, parts = seen(keys), Seen(512, 2)
    for part in keys.split(1):
        parts.look(part, part, part)
    assert torch.equal(whole.counts["k_scale"], parts.counts["k_scale"])
    assert torch.equal(whole.largest["q_scale"], parts.largest["q_scale"])


def test_nothing_but_zeros_has_scale_one() -> None:
    scales, notes = kv_scales.choose(seen(torch.zeros(1, 1, 4, 8)), KvSettings("max"))
    assert scales["k_scale"].tolist() == [1.0]
    assert notes[0].error == 0


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_a_checkpoint_brings_the_scales_of_the_quantized_model(
    make_scaled: Callable[..., Path], tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path, method: str,
    strategy: str,
) -> None:  # fmt: skip
    """With `max` they are the largest keys and values that the written checkpoint gives on the calibration text."""
    out = make_scaled(tiny_llama, texts[0], tmp_path / "out", method=method, choice="max", strategy=strategy)
    written = open_checkpoint(out, quantized=True)
    windows = tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=6, length=64, seed=0)
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert scheme == {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    from quantkit.draft.train import build_model

    with torch.no_grad():
        cache = build_model(written, dtype=torch.float32)(windows.input_ids_ST, use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        found = written.kv_scales(index)
        assert found is not None
        for scale, x_BHTD in ((found.key, layer.keys), (found.value, layer.values)):
            largest = x_BHTD.abs().amax((0, 2, 3)) if strategy == "attn_head" else x_BHTD.abs().max()[None]
            assert torch.allclose(scale, largest / 448, rtol=0.02)
    notes = stream.kv_notes(tmp_path / "out.layers", written.arch.num_layers)
    assert [[note.name for note in layer] for layer in notes] == [["q_scale", "k_scale", "v_scale"]] * len(notes)


def test_scales_that_a_config_promises_must_be_there(
    make_scaled: Callable[..., Path], tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out = make_scaled(tiny_llama, texts[0], tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    bare = {name: tensor for name, tensor in weights.items() if not name.endswith(("attn.k_scale", "attn.v_scale"))}
    assert len(bare) == len(weights) - 4
    save_file(bare, out / "model.safetensors")
    with pytest.raises(QuantkitError, match=r"4 scales are missing \(model.layers.0.self_attn.k_scale"):
        open_checkpoint(out)


def test_a_format_that_drops_scales_is_refused_or_asked_for() -> None:
    asked = {"format": "awq", "method": "awq", "kv_cache": "fp8"}
    with pytest.raises(QuantkitError, match="drops those of awq and gptq without a word"):
        check(Quantize, asked, where="quantize")
    assert check(Quantize, asked | {"uncalibrated_kv_cache": True}, where="quantize").uncalibrated_kv_cache
    with pytest.raises(QuantkitError, match="leave it out"):
        check(Quantize, {"kv_cache": "fp8", "uncalibrated_kv_cache": True}, where="quantize")
    with pytest.raises(ValueError, match="vLLM drops the KV scales"):
        quantization_config.build(
            "gptq", bits=4, group_size=32, symmetric=True, ignore=["lm_head"], kv_strategy="tensor"
        )
