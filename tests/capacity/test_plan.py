"""The command: a screenful, JSON and a page from config.json and headers alone, without torch, in a second or so."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit import artifacts
from quantkit.capacity import machines, planning, sizing, subject, weights
from quantkit.cli import main

RECIPE = Path(__file__).parents[2] / "recipes" / "llama-2-70b-h100.yaml"
SMALL = ("--context", 512, "--answer-tokens", 64, "--users", 4)


def _call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(word) for word in ("plan", *words)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def test_no_torch_and_little_time() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom quantkit import cli, summary\n"
        "from quantkit.capacity import subject\n"
        f"summary.print_plan(*subject.plan(Path({str(RECIPE)!r}), gpu=None, given={{}}))\n"
        "assert not {'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules), 'a heavy import'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), timeout=60)
    assert run.returncode == 0, run.stderr
    assert "not both at once" in run.stdout and "Estimates, not measurements" in run.stdout


def test_both_forms_side_by_side(tiny_llama: Path) -> None:
    code, said = _call(tiny_llama, "--gpu", "l4", "--price-per-hour", 0.7, *SMALL)
    assert code == 0, said
    names = ("float32, served as float16; float16 KV", "4 bits, groups of 64; fp8 KV")
    for words in (*names, "max-num-queued-tokens", "$", "KV blocks", "TTFT", "estimates"):
        assert words in said, words


def test_json_is_the_plan(tiny_llama: Path) -> None:
    code, said = _call(tiny_llama, "--gpu", "h100-80gb:2", "--kv-cache", "fp8", "--json", *SMALL)
    plan = planning.Plan.model_validate_json(said)
    assert code == 0 and plan.question.gpus == 2
    assert [column.kv_cache for column in plan.columns] == ["fp8", "fp8"]
    stored = plan.columns[0].chosen
    assert stored is not None and (stored.replicas, stored.ranks) == (2, 1), "replicas before ranks"
    again = sizing.size(
        tiny_llama, kv_cache_bytes=stored.sizing.kv_cache_bytes, kv_cache_dtype="fp8", max_model_len=512
    )
    assert stored.sizing.num_blocks == again.num_blocks
    assert stored.sizing.concurrency == again.concurrency


def test_config_json_alone_is_enough(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    alone = weights.open_model(tmp_path)
    assert weights.as_stored(alone)[1:] == weights.as_stored(weights.open_model(tiny_llama))[1:]
    code, said = _call(tmp_path, "--gpu", "l4", *SMALL)
    assert code == 0 and "The weights are not there" in said


def test_what_if_of_a_draft(tiny_llama: Path) -> None:
    code, said = _call(
        tiny_llama, "--gpu", "l4", "--acceptance", 0.7, "--draft-tokens", 5, "--draft-size", 0.5, *SMALL, "--json"
    )
    plan = planning.Plan.model_validate_json(said)
    assert code == 0 and plan.accepted_length == pytest.approx((1 - 0.7**6) / 0.3)
    assert plan.draft is not None and "hypothetical" in plan.draft
    assert all(point.speedup is not None for column in plan.columns for point in column.points)
    assert all(column.limits and column.limits.max_num_batched_tokens >= 6 * column.limits.max_num_seqs
               for column in plan.columns)  # fmt: skip


def test_a_draft_brings_what_was_counted(tiny_llama: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    counted = {"kept": "after", "acceptance": {"after": {"0": {"vllm": {"per_position": [0.5, 0.25]}}}}}
    with artifacts.making(draft, "draft", inputs={}, settings={}) as work:
        for path in tiny_llama.iterdir():
            shutil.copy(path, work.out / path.name)
        work.results.update(counted)
    found = planning.real_draft(draft)
    assert list(found.accepted) == [1.5, 1.75]
    answer = subject.plan(tiny_llama, gpu="l4", given={"draft": draft, "context": 512, "draft_tokens": 2})
    assert answer.plan.accepted_length == 1.75
    code, said = _call(tiny_llama, "--gpu", "l4", "--draft", draft, "--draft-tokens", 3, *SMALL)
    assert code == 2 and "the draft's manifest knows up to 2" in said
    head = tmp_path / "head"
    head.mkdir()
    config = json.loads((tiny_llama / "config.json").read_text())
    (head / "config.json").write_text(
        json.dumps({"speculators_model_type": "eagle3", "transformer_layer_config": config})
    )
    code, said = _call(tiny_llama, "--gpu", "l4", "--draft", head, *SMALL)
    assert code == 2 and "EAGLE-3 head" in said
    code, said = _call(tiny_llama, "--gpu", "l4", "--draft", tiny_llama, *SMALL)
    assert code == 2 and "nobody counted how often" in said


def test_three_files(tiny_llama: Path, tmp_path: Path) -> None:
    code, _ = _call(
        tiny_llama, "--gpu", "l4", "--acceptance", 0.7, "--draft-size", 0.5, *SMALL, "--out", tmp_path / "plan"
    )
    assert code == 0
    data = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert data["claims"] == [] and len(data["columns"]) == 3
    assert "| KV blocks a replica |" in (tmp_path / "plan" / "plan.md").read_text()
    page = (tmp_path / "plan" / "plan.html").read_text()
    assert page.count("<svg") == 2 and "src=" not in page and "<script" not in page
    assert "4 bits, groups of 64; fp8 KV" in page and "speculation loses from" in page


def test_mistakes_are_a_line_with_the_remedy(tiny_llama: Path, tmp_path: Path) -> None:
    for words, said in (
        ((tiny_llama,), "Give --gpu h100-80gb, FILE.yaml or cpu"),
        ((tiny_llama, "--gpu", "h10"), "did you mean"),
        ((tiny_llama, "--gpu", "cpu:2"), "leave the number out"),
        ((tmp_path / "none", "--gpu", "l4"), "is no folder: give a checkpoint"),
        ((tmp_path, "--gpu", "l4"), "config.json is not there"),
        ((tiny_llama, "--gpu", "l4", "--context", 100_000), "exceeds the 2048 positions"),
        ((tiny_llama, "--gpu", "l4", "--acceptance", 0.5, *SMALL), "without a draft"),
    ):
        code, output = _call(*words)
        assert code == 2 and said in output and output.count("\n") == 1, (words, output)


def test_a_saved_processor_is_a_gpu_of_ones_own(tiny_llama: Path, tmp_path: Path) -> None:
    saved = tmp_path / "here.yaml"
    code, said = _call(tiny_llama, "--gpu", "cpu", "--dtype", "float32", "--save-gpu", saved, *SMALL)
    assert code == 0 and "products measured with 64 and 128 inputs" in said, said
    again = _call(tiny_llama, "--gpu", saved, "--dtype", "float32", *SMALL)
    assert again == (code, said)
    own = machines.find(str(saved))
    assert own.measured is not None
    narrow = own.measured.model_copy(update={"fp8_cache": False})
    machines.save(own.model_copy(update={"measured": narrow}), saved)
    code, said = _call(tiny_llama, "--gpu", saved, "--dtype", "float32", "--kv-cache", "fp8", *SMALL)
    assert code == 2 and "vLLM has none of 8 bits" in said
    code, said = _call(tiny_llama, "--gpu", saved, "--dtype", "float16", *SMALL)
    assert code == 2 and "measured in float32" in said
