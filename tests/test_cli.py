"""The command line: its words are frozen, each command explains itself, and mistakes are one line and an exit code."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from quantkit.cli import main

# What scripts of users call. To change a line here is to break them.
FROZEN = {
    "run": "recipe --dry-run --fresh --on --out --set",
    "quantize": "checkpoint --average-bits --bit-choices --bits --calibration --continuations --device --effort "
    "--engine --engine-option --format --fresh --group-size --ignore --kv-cache --kv-scales --kv-strategy "
    "--length --memory-budget --method --on --out --override --samples --seed --symmetric --uncalibrated-kv-cache",
    "engines install": "name",
    "eval": "candidates --chat --chat-tokens --compare --device --draft --fresh --kv-cache --length --long-length "
    "--long-samples --max-perplexity-drift --on --out --profile --reference --samples --seed --served --stride --task "
    "--task-limit --text",
    "train-draft": "target --answer-tokens --batch-size --draft-vocab-size --epochs --fit --fresh "
    "--held-out-prompts --init --keep-layers --kind --layer-choice --learning-rate --loss --on --on-policy --out "
    "--patience --prompt-tokens --prompts --quantize --seed --speculative-tokens --temperature --top-k "
    "--validation-prompts",
    "bench": "bundle --baseline --concurrency --fresh --knee --out --output-tokens --price-per-hour --prompts "
    "--requests --rounds --servers --system-prompt --temperature --tpot-limit --ttft-limit --variant --what-if",
    "serve bundle": "--bench --draft --fresh --gpu-memory-utilization --gpus-per-node --kv-cache-dtype "
    "--kv-cache-skip-layers "
    "--max-model-len --max-num-batched-tokens --max-num-seqs --out --prefix-caching --replicas --report --router "
    "--served-model-name --speculate --speculative-tokens --target --tensor-parallel-size --uncalibrated-kv-cache",
    "serve check": "bundle --public-key --start",
    "serve sign": "bundle --private-key",
    "serve verify": "bundle --public-key",
    "serve up": "bundle --log --port --probe --profile",
    "plan": "checkpoint --acceptance --answer-tokens --context --draft --draft-size --draft-tokens --dtype --gpu "
    "--gpu-memory-utilization --json --kv-cache --out --price-per-hour --save-gpu --ttft-limit --users",
    "inspect": "path",
}


def _commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _words(command: click.Command) -> str:
    arguments = [p.name or "" for p in command.params if isinstance(p, click.Argument)]
    options = sorted(p.opts[0] for p in command.params if isinstance(p, click.Option))
    return " ".join(arguments + options)


def test_commands_and_options_are_frozen() -> None:
    assert {name: _words(command) for name, command in _commands(main)} == FROZEN


@pytest.mark.parametrize("name", FROZEN)
def test_help_has_an_example_that_parses(name: str) -> None:
    command = dict(_commands(main))[name]
    said = CliRunner().invoke(main, [*name.split(), "--help"])
    assert said.exit_code == 0
    assert command.help is not None
    examples = [line.strip() for line in command.help.splitlines() if line.strip().startswith("quantkit ")]
    assert examples
    for example in examples:
        words = example.split()[1 + len(name.split()) :]
        command.make_context(name, words)  # refuses an option that is not there


def _call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr


def _quantize(checkpoint: Path, out: Path, text: object, *more: object) -> tuple[int, str]:
    sizes = ("--samples", 4, "--length", 64, "--group-size", 32)
    return _call("quantize", checkpoint, "--out", out, "--calibration", text, *sizes, *more)


def test_a_group_that_does_not_divide_is_refused_before_anything_is_written(
    tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    code, said = _quantize(tiny_llama, tmp_path / "out", texts[0], "--group-size", 48)
    assert code == 2 and "48" in said and "Traceback" not in said
    assert not (tmp_path / "out" / "quantkit.json").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--bits", "auto", "--average-bits", 5, "--bit-choices", "4;16"), "write it as 4,16"),
        (("--bit-choices", "4,16"), "bit_choices is for bits auto"),
        (("--bits", "auto", "--average-bits", 5, "--bit-choices", "4,8", "--format", "awq"), "awq stores no linear in"),
    ],
)
def test_bit_choices_that_cannot_be_are_refused(
    options: tuple[object, ...], reason: str, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    code, said = _quantize(tiny_llama, tmp_path / "out", texts[0], *options)
    assert code == 2 and reason in said and "Traceback" not in said


def test_too_little_text_is_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("count from one to ten")
    code, said = _quantize(tiny_llama, tmp_path / "out", short)
    assert code == 2 and "lower samples or length" in said


def test_a_finished_output_is_fresh_and_another_run_is_refused(
    tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert _quantize(tiny_llama, out, texts[0])[0] == 0
    made = (out / "model.safetensors").stat().st_mtime_ns
    code, said = _quantize(tiny_llama, out, texts[0])
    assert code == 0 and "fresh" in said
    code, said = _quantize(tiny_llama, out, texts[1])
    assert code == 2 and "holds another run" in said
    assert (out / "model.safetensors").stat().st_mtime_ns == made
    assert _quantize(tiny_llama, out, texts[1], "--fresh")[0] == 0


def test_the_gate_has_its_own_exit_code_and_leaves_the_report(
    drifted_llama: Path, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    code, said = _call(
        "eval", drifted_llama, "--reference", tiny_llama, "--out", tmp_path / "report", "--text", texts[1],
        "--samples", 3, "--length", 64, "--chat", "no",
    )  # fmt: skip
    assert code == 8 and "must not be served" in said and "KL on text" in said
    assert (tmp_path / "report" / "quantkit.json").exists()


def test_a_head_on_too_few_layers_or_with_what_only_models_have_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    head = ("train-draft", tiny_llama, "--kind", "eagle3", "--out", tmp_path / "head")
    code, said = _call(*head)
    assert code == 2 and "the target has 2 layers" in said and "choose kind draft_model" in said
    code, said = _call(*head, "--keep-layers", 1, "--loss", "forward_kl")
    assert code == 2 and "kind eagle3 takes no keep_layers, loss" in said
    assert not (tmp_path / "head" / "quantkit.json").exists()


@pytest.mark.parametrize("word", ["eagle3", "my-DSpark-tests"])
def test_a_path_that_vllm_would_misread_is_refused(tiny_llama: Path, tmp_path: Path, word: str) -> None:
    code, said = _call("train-draft", tiny_llama, "--keep-layers", 1, "--out", tmp_path / word / "draft")
    assert code == 2 and "another kind of speculator" in said


def test_nothing_there_to_inspect_is_one_line(tmp_path: Path) -> None:
    code, said = _call("inspect", tmp_path)
    assert code == 2 and said.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB: enough for the result."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def _quantize_on(disk: Path, model: Path, text: Path) -> "subprocess.Popen[str]":
    command = [
        sys.executable, "-m", "quantkit.cli", "quantize", model, "--out", disk / "out", "--calibration", text,
        "--samples", "4", "--length", "64", "--group-size", "32",
    ]  # fmt: skip
    return subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def _fill(disk: Path) -> None:
    filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while os.write(filler, bytes(4096)):
            pass
    os.close(filler)


def test_a_disk_too_small_is_refused_before_any_work(
    small_disk: Path, tiny_llama: Path, texts: tuple[Path, Path]
) -> None:
    (small_disk / "filler").write_bytes(bytes(3900 << 10))
    process = _quantize_on(small_disk, tiny_llama, texts[0])
    _, said = process.communicate(timeout=900)
    assert process.returncode == 2 and "are free: lower the calibration's samples" in said, said
    assert "layer" not in said


def test_a_disk_that_fills_is_one_line_and_leaves_nothing_that_looks_complete(
    small_disk: Path, tiny_llama: Path, texts: tuple[Path, Path]
) -> None:
    process = _quantize_on(small_disk, tiny_llama, texts[0])
    while process.poll() is None and not (small_disk / "out" / ".partial" / "layers").exists():
        time.sleep(0.002)
    _fill(small_disk)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 2, said
    assert "disk is full" in said and "Traceback" not in said
    assert not (small_disk / "out" / "quantkit.json").exists()
