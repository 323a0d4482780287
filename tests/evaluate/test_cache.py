"""What a cache costs: layer by layer against one layer at a time, and scales against none where FP8's range ends."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quantkit import tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.evaluate import cache, divergence, windows
from quantkit.evaluate.windows import Windows
from quantkit.kv_cache import through
from quantkit.progress import silent
from quantkit.quantize.kv_scales import KvSettings


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script that compares types and scales, whose parts are what is asked here."""
    path = Path(__file__).parents[2] / "benchmarks" / "kv_cache.py"
    spec = importlib.util.spec_from_file_location("benchmark_kv_cache", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def passages(tiny_llama: Path, texts: tuple[Path, Path]) -> Windows:
    found = tokens.tokenize([str(texts[1])], tokens.load_tokenizer(tiny_llama), samples=12, length=64, seed=0)
    return windows.of_passages(found)


def test_each_layer_alone_is_that_layer_alone(tiny_llama: Path, passages: Windows, tmp_path: Path) -> None:
    model = open_checkpoint(tiny_llama)
    rounding = through("fp8", None)
    together = cache.by_layer(model, passages, lambda index: rounding, device="cpu", report=silent)
    whole = divergence.read(model, passages, tmp_path / "16", device="cpu", what="", report=silent)
    assert len(together) == model.arch.num_layers
    for only, kl in enumerate(together):
        alone = divergence.read(
            model, passages, tmp_path / str(only), device="cpu", what="", report=silent,
            cache=lambda index, only=only: rounding if index == only else None,  # type: ignore[misc]
        )  # fmt: skip
        scores = divergence.compare(model, model, (whole, alone), passages, device="cpu", report=silent)
        assert kl == pytest.approx(float(scores.kl_N.mean()), rel=1e-3)
        assert kl > 0


@pytest.mark.parametrize("factor", [400.0, 1 / 4000])
def test_calibrated_scales_cost_less_than_none_where_the_range_ends(
    factor: float, benchmark: ModuleType, tiny_llama: Path, texts: tuple[Path, Path], passages: Windows, tmp_path: Path
) -> None:
    """The same function with keys and values beyond FP8's range: with scales as good as before, without them not."""
    source = open_checkpoint(tiny_llama)
    model = benchmark.beyond(source, tmp_path / "beyond", factor)
    calibration = tokens.tokenize([str(texts[0])], tokens.load_tokenizer(tiny_llama), samples=6, length=64, seed=0)
    scales = benchmark.chosen(benchmark.watch(model, calibration.input_ids_ST), KvSettings("mse"))
    usual = benchmark.chosen(benchmark.watch(source, calibration.input_ids_ST), KvSettings("mse"))
    same = divergence.beside(source, model, passages, device="cpu", folder=tmp_path / "same", report=silent)
    assert float(same.kl_N.mean()) < 1e-6
    with_scales = benchmark.added(model, passages, "fp8", scales, tmp_path / "states")["kl_nats"]
    without = benchmark.added(model, passages, "fp8", None, tmp_path / "states")["kl_nats"]
    at_home = benchmark.added(source, passages, "fp8", usual, tmp_path / "home")["kl_nats"]
    at_home_without = benchmark.added(source, passages, "fp8", None, tmp_path / "home")["kl_nats"]
    assert with_scales["interval"][1] < without["interval"][0]
    assert with_scales["value"] == pytest.approx(at_home["value"], rel=0.25)
    assert at_home["value"] <= at_home_without["interval"][1]


def test_the_dearest_layers_are_left_where_the_cache_matters() -> None:
    kl = [0.001, 0.02, 0.001, 0.001, 0.008, 0.001, 0.001, 0.001]
    assert cache.to_leave(kl, added=0.03, weights=0.5) == []  # a fraction of what the weights cost
    assert cache.to_leave(kl, added=0.034, weights=0.15) == [1]
    assert cache.to_leave(kl, added=0.034, weights=0.1) == [1, 4]
    assert cache.to_leave(kl, added=0.034, weights=0.001) == [1, 4]  # a quarter of the layers at most
    assert cache.to_leave([0.0] * 8, added=0.1, weights=0.1) == []


def test_what_is_stored_as_it_is_costs_nothing(tiny_llama: Path) -> None:
    model = open_checkpoint(tiny_llama)
    assert cache.resolved(model, "auto") == "float16"
    assert cache.reader(model, "auto") is None
    given = cache.reader(model, "fp8")
    assert given is not None
    between = given(0)
    assert between is not None
    key = torch.full((1, 1, 1, 1), 1000.0)
    assert between(key, key, key)[1].item() == 448.0  # no scales there: 1.0
