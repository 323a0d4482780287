"""The bundle and its draft's plan: speculation on, off, always, never, on either kind of machine."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from rich.console import Console

from quantkit import artifacts, speculation, stages, vllm_environment
from quantkit.progress import Display
from quantkit.recipe import Serve
from quantkit.serve import check
from quantkit.serve.settings import from_recipe, to_yaml
from quantkit.speculation import Load, Option, Plan, Profile

FILES = {"gpu": "vllm/serve.yaml", "cpu": "vllm/serve.cpu.yaml"}


def _plan(profile: Profile, *speedups: float) -> Plan:
    """A plan for one and 32 sequences at once, whose options are 1, 2, ... tokens; at 32, four fifths of it."""
    loads = [
        Load(concurrency=size, step_s=0.02, options=[
            Option(tokens=k, speedup=round(times * part, 3), standard_error=0.01) for k, times in enumerate(speedups, 1)
        ])
        for size, part in ((1, 1.0), (32, 0.8))
    ]  # fmt: skip
    return Plan(
        profile=profile, origin="measured" if profile == "cpu" else "estimated", machine="a machine",
        context_tokens=128, measured_positions=1, accepted_length=[1.5] * len(speedups),
        accepted_length_standard_error=[0.01] * len(speedups), loads=loads,
    )  # fmt: skip


def _draft(tiny_llama: Path, out: Path, *plans: Plan) -> Path:
    with artifacts.making(out, "draft", inputs={}, settings={}) as work:
        shutil.copytree(tiny_llama, out, dirs_exist_ok=True)
        work.results |= {"accepted": 0.5} | speculation.summary(plans)
    return out


def _bundle(tiny_llama: Path, tmp_path: Path, *plans: Plan, **serve: Any) -> Path:
    draft = tmp_path / "draft"
    if not draft.exists():
        _draft(tiny_llama, draft, *plans)
    settings = Serve(served_model_name="tiny", kv_cache_dtype="auto", max_model_len=1024, **serve)
    out = tmp_path / "bundle"
    stage = stages.bundle(tiny_llama, draft=draft, report_dir=None, settings=settings)
    stages.run_stage(stage, out, display=Display(Console(quiet=True)))
    return out


def _tokens(bundle: Path) -> dict[str, int | None]:
    found = {}
    for profile, file in FILES.items():
        flags = yaml.safe_load((bundle / file).read_text())
        found[profile] = flags.get("speculative-config", {}).get("num_speculative_tokens")
    return found


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks without the half-minute import of vLLM."""
    monkeypatch.setattr(vllm_environment, "distribution", lambda: None)


def _is_good(bundle: Path) -> bool:
    return all(one.passed or one.detail.startswith("not run") for one in check.check(bundle))


def test_a_plan_that_pays_sets_the_number_of_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    bundle = _bundle(tiny_llama, tmp_path, _plan("gpu", 1.4, 1.6), _plan("cpu", 1.5, 1.4))
    assert _tokens(bundle) == {"gpu": 2, "cpu": 1} and (bundle / "draft").is_dir() and _is_good(bundle)
    assert "num_speculative_tokens: 2  # the draft's plan" in (bundle / FILES["gpu"]).read_text()
    readme = (bundle / "README.md").read_text()
    assert "2 tokens at a time on GPUs, 1 on a CPU" in readme
    assert (
        "| 1 | 2 draft tokens | 1.60 +- 0.02 | 20 |" in readme
        and "| 32 | 1 draft token | 1.20 +- 0.02 | 20 |" in readme
    )
    assert "an estimate for a machine from bytes and operations, in the draft's favour, not a measurement" in readme
    assert "steps measured on a machine" in readme and "foretold beyond" in readme
    assert (bundle / "speculation.svg").read_text().startswith("<svg")


def test_a_plan_that_does_not_pay_leaves_the_draft_out(tiny_llama: Path, tmp_path: Path) -> None:
    bundle = _bundle(tiny_llama, tmp_path, _plan("gpu", 1.1, 0.9), _plan("cpu", 0.7, 0.5))
    assert _tokens(bundle) == {"gpu": None, "cpu": None} and not (bundle / "draft").exists() and _is_good(bundle)
    record = json.loads((bundle / "bundle.json").read_text())
    assert record["pin"]["draft"] is None and record["speculation"]["plans"]["cpu"]["loads"]
    readme = (bundle / "README.md").read_text()
    assert "No draft: served without speculation." in readme and "off: not sure to pay at every load" in readme
    assert "| 1 | 1 draft token | 1.10 +- 0.02 | 20 |" in readme and "do not speculate" in readme
    assert (bundle / "speculation.svg").is_file()


def test_fewer_sequences_may_pay_where_more_do_not(tiny_llama: Path, tmp_path: Path) -> None:
    bundle = _bundle(tiny_llama, tmp_path, _plan("gpu", 1.1, 0.9), _plan("cpu", 0.7), max_num_seqs=1)
    assert _tokens(bundle) == {"gpu": 1, "cpu": None} and _is_good(bundle)
    assert "1 tokens at a time on GPUs, none on a CPU" in (bundle / "README.md").read_text()


def test_a_plan_for_a_cpu_says_nothing_of_gpus(tiny_llama: Path, tmp_path: Path) -> None:
    bundle = _bundle(tiny_llama, tmp_path, _plan("cpu", 0.7))
    assert _tokens(bundle) == {"gpu": 4, "cpu": None} and (bundle / "draft").is_dir() and _is_good(bundle)
    assert "no plan for this kind of machine" in (bundle / "README.md").read_text()
    cpu = (bundle / FILES["cpu"]).read_text()
    assert "override-generation-config" not in cpu, "without a draft, other temperatures are right on a CPU too"


@pytest.mark.parametrize(("speculate", "tokens"), [("always", 1), ("never", None)])
def test_the_user_decides(
    speculate: Literal["always", "never"], tokens: int | None, tiny_llama: Path, tmp_path: Path
) -> None:
    bundle = _bundle(tiny_llama, tmp_path, _plan("gpu", 0.9, 0.8), _plan("cpu", 0.9, 0.8), speculate=speculate)
    assert _tokens(bundle) == {"gpu": tokens, "cpu": tokens} and _is_good(bundle)
    assert (bundle / "draft").exists() == (tokens is not None)
    assert f"serve.speculate is {speculate}" in (bundle / "README.md").read_text()


def test_without_a_plan_the_draft_is_used_as_it_always_was(tiny_llama: Path, tmp_path: Path) -> None:
    bundle = _bundle(tiny_llama, tmp_path)
    assert _tokens(bundle) == {"gpu": 4, "cpu": 4} and _is_good(bundle)
    assert not (bundle / "speculation.svg").exists()


def test_a_draft_that_no_file_uses_is_found(tiny_llama: Path, tmp_path: Path) -> None:
    bundle = _bundle(tiny_llama, tmp_path, speculate="never")
    shutil.copytree(tiny_llama, bundle / "draft")
    found = {one.name: one.detail for one in check.check(bundle) if not one.passed}
    assert "no settings file has a speculative-config" in found["settings files"]


def test_same_inputs_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    sums = []
    for _ in range(2):
        bundle = _bundle(tiny_llama, tmp_path, _plan("cpu", 1.5))
        sums.append((bundle / "SHA256SUMS").read_text())
        shutil.rmtree(bundle)
    assert sums[0] == sums[1]


def test_a_head_is_served_by_load(tiny_llama: Path) -> None:
    """vLLM follows a schedule for EAGLE-3; for a separate draft it would make the passes all the same."""
    alone, many = _plan("gpu", 1.4, 1.6, 1.7).loads[0], _plan("gpu", 1.1, 0.7, 0.6).loads[0]
    loads = [alone, many.model_copy(update={"concurrency": 32})]
    plans: dict[Profile, Plan] = {"gpu": _plan("gpu", 1, 1, 1).model_copy(update={"loads": loads})}
    recipe = Serve(served_model_name="tiny", max_model_len=1024, max_num_seqs=64)
    for method, expected in (("eagle3", [[1, 1, 3], [2, 64, 1]]), ("draft_model", None)):
        settings, sources, decisions = from_recipe(recipe, tiny_llama, plans=plans, method=method)  # type: ignore[arg-type]
        written = yaml.safe_load(to_yaml(settings, "gpu", sources=sources)).get("speculative-config", {})
        assert written.get("num_speculative_tokens_per_batch_size") == expected
        assert (written["num_speculative_tokens"] == 3) == (method == "eagle3")
        assert decisions["gpu"].why.startswith("on by load") == (method == "eagle3")
