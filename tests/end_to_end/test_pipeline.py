"""The real pipeline and the real vLLM on a two-layer Llama: run, run again, change something, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2400)]

Quantkit = Callable[..., Result]
FOLDERS = ("target", "report", "draft", "bundle", "served")


@pytest.fixture(scope="module")
def recipe(
    tiny_llama: Path, texts: tuple[Path, Path], prompts: Path, tiny_recipe: Callable[..., dict[str, Any]],
    save_recipe: Callable[[Path, dict[str, Any]], Path], tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    folder = tmp_path_factory.mktemp("recipe")
    return save_recipe(folder / "tiny.yaml", tiny_recipe(tiny_llama, *texts, prompts))


@pytest.fixture(scope="module")
def finished(recipe: Path, quantkit: Quantkit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, made once."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = quantkit("run", recipe, "--out", out)
    assert done.exit_code == 0, done.stderr[-3000:]
    assert f"bundle  {out / 'bundle'}" in done.stderr
    assert all(row in done.stderr for row in ("expected on a CPU", "expected on GPUs", "speculation on a CPU"))
    return out


def _results(out: Path, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / folder / "quantkit.json").read_text())["results"]
    return results


def test_every_stage_left_a_manifest_and_nothing_partial(finished: Path) -> None:
    for folder in FOLDERS:
        assert (finished / folder / "quantkit.json").is_file()
        assert not (finished / folder / ".partial").exists()


def test_the_server_kept_what_the_bundle_promises(finished: Path) -> None:
    results = _results(finished, "served")
    assert {check["name"]: check["detail"] for check in results["checks"] if not check["passed"]} == {}
    assert results["probe"]["proposed_tokens"] > 0 and results["probe"]["prefix_hit_tokens"] > 0


def test_the_draft_was_measured_before_and_after_by_vllm(finished: Path) -> None:
    results = _results(finished, "draft")
    for when in ("before", "after", "quantized"):
        assert results["acceptance"][when]["0"]["vllm"]["drafts"] > 0
    assert results["epoch_losses"][1] < results["epoch_losses"][0]
    kept = json.loads((finished / "draft" / "config.json").read_text())
    assert ("quantization_config" in kept) == (results["kept"] == "quantized")


def test_the_draft_has_plans_and_the_bundle_says_what_it_made_of_them(finished: Path) -> None:
    results = _results(finished, "draft")
    plans = {plan["profile"]: plan for plan in results["plan"]}
    assert {profile: plan["origin"] for profile, plan in plans.items()} == {"cpu": "measured", "gpu": "estimated"}
    for plan in plans.values():
        assert all(load["step_s"] > 0 for load in plan["loads"]) and plan["measured_positions"] == 3
    counted = results["acceptance"][results["kept"]]["0"]["vllm"]
    assert plans["cpu"]["accepted_length"][2] == pytest.approx(counted["accepted_length"], rel=1e-3)
    expected = {name: each["gpu"] for name, each in results["expected_speed_up"].items()}
    assert (
        expected.keys() == {"after", "quantized"} and max(expected, key=lambda name: expected[name]) == results["kept"]
    )
    assert "an estimate" in results["kept_by"]
    why = _results(finished, "bundle")["speculation"]
    assert why.keys() == plans.keys() and all(sentence.startswith("on") for sentence in why.values())
    readme = (finished / "bundle" / "README.md").read_text()
    assert why["cpu"] in readme and "Expected on a CPU, steps measured on" in readme
    assert (finished / "bundle" / "speculation.svg").is_file()


def test_vllm_counts_what_the_simulation_counts(finished: Path) -> None:
    """Two ways to the same number: vLLM's counters, and one forward pass of the draft along the target's text."""
    results = _results(finished, "draft")
    for when in ("before", "after", "quantized"):
        found = results["acceptance"][when]["0"]
        served, simulated = found["vllm"], found["offline"]["greedy"]
        assert served["accepted_length"] == pytest.approx(simulated["accepted_length"], abs=0.25)
    assert results["engine_and_logits_apart"] == []


def test_the_target_is_judged_through_vllm_and_with_its_draft(
    finished: Path, tiny_llama: Path, texts: tuple[Path, Path], prompts: Path, quantkit: Quantkit, tmp_path: Path
) -> None:
    done = quantkit(
        "eval", finished / "target", "--reference", tiny_llama, "--out", tmp_path / "report", "--text", texts[1],
        "--samples", 4, "--length", 64, "--chat", prompts, "--chat-tokens", 16, "--served", "--profile", "none",
        "--draft", finished / "draft",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr[-3000:]
    (found,) = _results(tmp_path, "report")["candidates"]
    drafted = _results(finished, "draft")
    counted = drafted["acceptance"][drafted["kept"]]["0"]["vllm"]
    assert found["acceptance"]["accepted_length"] == pytest.approx(counted["accepted_length"], abs=1e-6)
    for kind in ("text", "chat"):
        served, kl = found["served"][kind], found["on"][kind]["kl_nats"]["value"]
        assert abs(served["gap_nats"]["value"]) < 0.05 and kl > 0.01, "vLLM serves these weights and no others"


def test_a_second_run_finds_all_fresh_and_starts_nothing(finished: Path, recipe: Path, quantkit: Quantkit) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    again = quantkit("run", recipe, "--out", finished)
    assert again.exit_code == 0 and again.stderr.count("fresh ") == len(FOLDERS)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_where_vllm_answers_is_no_part_of_the_work(finished: Path, recipe: Path, quantkit: Quantkit) -> None:
    done = quantkit("run", recipe, "--out", finished, "--dry-run", "--set", "cluster.address=10.0.0.1:6379")
    assert dict(line.split() for line in done.stdout.splitlines()) == dict.fromkeys(FOLDERS, "fresh")


@pytest.mark.parametrize(("on", "asked"), [((), "127.0.0.1:1"), (("--on", "ray://127.0.0.1:2"), "127.0.0.1:2")])
def test_vllm_answers_where_the_recipe_says_or_the_command(
    on: tuple[str, ...], asked: str, recipe: Path, quantkit: Quantkit, tmp_path: Path
) -> None:
    changes = ("--set", "cluster.address=ray://127.0.0.1:1", "--set", "calibration.text=[self:2]")
    done = quantkit("run", recipe, "--out", tmp_path / "out", *changes, *on)
    assert done.exit_code == 2 and f"no Ray cluster could be joined at '{asked}'" in done.stderr, done.stderr


def test_a_dry_run_says_what_a_change_costs(finished: Path, recipe: Path, quantkit: Quantkit) -> None:
    done = quantkit("run", recipe, "--out", finished, "--dry-run", "--set", "serve.max_num_seqs=2")
    states = dict(line.split() for line in done.stdout.splitlines())
    assert states == {"target": "fresh", "report": "fresh", "draft": "fresh", "bundle": "runs", "served": "runs"}


def test_a_bench_is_one_more_stage(finished: Path, recipe: Path, quantkit: Quantkit) -> None:
    done = quantkit("run", recipe, "--out", finished, "--dry-run", "--set", "bench.variants=[w4]")
    states = dict(line.split() for line in done.stdout.splitlines())
    assert states == dict.fromkeys(FOLDERS, "fresh") | {"bench": "runs"}


def test_the_bundle_moves_and_still_checks(finished: Path, quantkit: Quantkit, tmp_path: Path) -> None:
    moved = tmp_path / "eagle3-elsewhere"
    shutil.copytree(finished / "bundle", moved)
    done = quantkit("serve", "check", moved)
    assert done.exit_code == 0, done.output
    (moved / "draft" / "config.json").write_text("{}")
    assert quantkit("serve", "check", moved).exit_code == 2


def test_inspect_says_what_things_are(finished: Path, quantkit: Quantkit) -> None:
    said = quantkit("inspect", finished / "target").stdout
    assert "4 bit, group 32, compressed-tensors" in said and "relative output error" in said


def test_another_recipe_does_not_touch_the_run(finished: Path, recipe: Path, quantkit: Quantkit) -> None:
    done = quantkit("run", recipe, "--out", finished, "--set", "name=other")
    assert done.exit_code == 2 and "holds a run of the recipe 'tiny'" in done.stderr


def test_every_wrong_input_is_named_before_any_work(
    recipe: Path, texts: tuple[Path, Path], quantkit: Quantkit, tmp_path: Path
) -> None:
    done = quantkit(
        "run", recipe, "--out", tmp_path / "out", "--set", f"evaluate.text=[{texts[0]}]", "--set", "model=nowhere"
    )
    assert done.exit_code == 2 and "2 problems" in done.stderr and not (tmp_path / "out").exists()
    assert "nowhere is not a directory" in done.stderr and "calibration and held-out" in done.stderr
