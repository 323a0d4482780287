"""The quickstart recipe itself, on the real 135M Llama: what it promises, and that the second run finds all fresh."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

pytestmark = [pytest.mark.vllm, pytest.mark.quickstart, pytest.mark.timeout(3600)]

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def test_the_quickstart_keeps_its_promises(quantkit: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    done = quantkit("run", RECIPE, "--out", out)
    assert done.exit_code == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = {
        folder: json.loads((out / folder / "quantkit.json").read_text())
        for folder in ("checkpoint", "target", "report", "draft", "bundle", "served")
    }
    report, draft, served = (found[folder]["results"] for folder in ("report", "draft", "served"))
    for folder, manifest in found.items():
        assert manifest["cost"]["peak_memory_bytes"] < 8e9, folder
    assert 0 < report["drift"]["value"] < 0.15 and report["drift"]["standard_error"] < 0.05
    assert report["kl_nats"]["mean"] < 0.2 and report["top1_agreement"]["value"] > 0.7
    assert "4-bit blocks of 32" in (out / "report" / "report.html").read_text()
    before, after = (draft["acceptance"][when]["0"] for when in ("before", "after"))
    assert after["vllm"]["accepted_length"] > 1.5 * before["vllm"]["accepted_length"]
    simulated = after["offline"]["greedy"]["accepted_length"]
    assert after["vllm"]["accepted_length"] == pytest.approx(simulated, abs=0.1)
    assert all(check["passed"] for check in served["checks"])
    assert served["probe"]["proposed_tokens"] > 0 and served["probe"]["prefix_hit_tokens"] > 0
    begin_s = time.monotonic()
    again = quantkit("run", RECIPE, "--out", out)
    assert again.exit_code == 0 and again.stderr.count("fresh ") == len(found)
    assert time.monotonic() - begin_s < 20
