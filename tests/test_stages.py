"""Stages run one by one: the verdict that stops a run, again when the result is fresh."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from quantkit import stages
from quantkit.errors import GateFailed
from quantkit.progress import Display
from quantkit.recipe import Evaluate


def test_a_failed_gate_stops_the_run_each_time_and_leaves_the_reasons(
    make_llama, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    other = make_llama(tmp_path / "other", seed=9, initializer_range=0.9)
    settings = Evaluate(text=(str(texts[1]),), samples=3, length=48, max_perplexity_drift=0.02)
    said = io.StringIO()
    for _ in range(2):
        with pytest.raises(GateFailed, match="must not be served") as caught:
            stage = stages.evaluate(other, tiny_llama, settings=settings, seed=0)
            stages.run_stage(stage, tmp_path / "report", display=Display(Console(file=said)))
        assert caught.value.exit_code == 8
    assert "fresh eval" in said.getvalue(), "the second time nothing is computed"
    assert (tmp_path / "report" / "report.html").is_file()
