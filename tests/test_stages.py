"""Stages run one by one: the verdict that stops a run, again when the result is fresh."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from quantkit import artifacts, stages
from quantkit.errors import GateFailed
from quantkit.progress import Display
from quantkit.recipe import Evaluate, Serve


def test_a_failed_gate_stops_the_run_each_time_and_leaves_the_reasons(
    drifted_llama: Path, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = Evaluate(text=(str(texts[1]),), samples=3, length=48, chat="no")
    said = io.StringIO()
    for _ in range(2):
        with pytest.raises(GateFailed, match="must not be served") as caught:
            stage = stages.evaluate([drifted_llama], tiny_llama, settings=settings, seed=0)
            stages.run_stage(stage, tmp_path / "report", display=Display(Console(file=said)))
        assert caught.value.exit_code == 8
    assert "fresh eval" in said.getvalue(), "the second time nothing is computed"
    assert (tmp_path / "report" / "report.html").is_file()


def _manifest(out: Path, kind: artifacts.Kind, **results: object) -> Path:
    with artifacts.making(out, kind, inputs={}, settings={}) as work:
        work.out.mkdir(exist_ok=True)
        (work.out / "config.json").write_text(out.name)
        work.results |= results
    return out


def test_a_bundle_takes_the_evaluations_word_for_layers_at_16_bits(tmp_path: Path) -> None:
    target, other = (_manifest(tmp_path / name, "quantized", of=name) for name in ("target", "other"))
    judged = {"digest": f"sha256:{artifacts.digest(target)}", "kv_cache": "auto", "cache": {"leave_at_16_bits": [1, 3]}}
    report = _manifest(tmp_path / "report", "report", candidates=[judged | {"kv_cache": "fp8", "cache": None}, judged])
    assert stages.left_at_16_bits(report, target) == [1, 3]
    assert stages.left_at_16_bits(None, target) == []
    assert stages.left_at_16_bits(report, other) == []


def test_what_was_quantized_for_an_uncalibrated_cache_is_served_with_one(tmp_path: Path) -> None:
    bare = _manifest(tmp_path / "bare", "quantized", kv_cache={"type": "fp8", "calibrated": False})
    scaled = _manifest(tmp_path / "scaled", "quantized", kv_cache={"type": "fp8", "calibrated": True})
    served = stages.as_quantized(Serve(), bare)
    assert (served.kv_cache_dtype, served.uncalibrated_kv_cache) == ("fp8", True)
    assert stages.as_quantized(Serve(), scaled) == Serve()
    assert stages.as_quantized(Serve(kv_cache_dtype="float16"), bare).kv_cache_dtype == "float16"
