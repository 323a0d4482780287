"""A full disk, a folder that cannot be written, an input that is lost, a clock that moved, two at once: what a user
sees, and that the same command goes on to the same bytes afterwards.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from quantkit import artifacts
from tests.faults import mounts
from tests.faults.kills import whole_folders
from tests.faults.tiny_run import write_inputs

Words = list[object]


class Made(NamedTuple):
    """The inputs of a tiny run, and what came of its stages that need no vLLM."""

    folder: Path
    recipe: Path
    checkpoint: Path
    target: Path
    bundle: Path


@pytest.fixture(scope="module")
def made(quantkit, tmp_path_factory: pytest.TempPathFactory) -> Made:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("tiny")
    recipe = write_inputs(folder)
    found = Made(folder, recipe, folder / "model", folder / "target", folder / "bundle")
    for name in ("quantize", "bundle"):
        done = quantkit(*words(found, name, found.target if name == "quantize" else found.bundle))
        assert done.exit_code == 0, done.output
    return found


def words(made: Made, name: str, out: Path) -> Words:
    """A command that writes `out`."""
    text = ["--samples", 8, "--length", 64]
    return {
        "run": ["run", made.recipe, "--out", out],
        "quantize": ["quantize", made.checkpoint, "--out", out, "--calibration", made.folder / "calibration.txt", *text,
                     "--group-size", 32],
        "eval": ["eval", made.target, "--reference", made.checkpoint, "--out", out, "--text",
                 made.folder / "held_out.txt", *text, "--chat", "no", "--profile", "none"],
        "bundle": ["serve", "bundle", "--target", made.target, "--out", out],
        "train-draft": ["train-draft", made.target, "--out", out, "--keep-layers", 1, "--prompts",
                        made.folder / "prompts.jsonl"],
        "bench": ["bench", made.bundle, "--baseline", made.checkpoint, "--out", out],
    }[name]  # fmt: skip


WRITERS = ("run", "quantize", "eval", "bundle", "train-draft", "bench")


def same_bytes(out: Path, other: Path) -> bool:
    one, two = ({n: f for n, f in artifacts.record_files(each).items() if n != "report.json"} for each in (out, other))
    return one == two


def refused(done, *said: str) -> None:  # type: ignore[no-untyped-def]
    """One line with the remedy, and no traceback."""
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (done.exception, done.stderr)
    last = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(last) == 1 and all(each in last[0] for each in said), done.stderr


@pytest.mark.parametrize("size", ["4k", "16k", "64k", "128k", "200k"])
@pytest.mark.parametrize("name", ["quantize", "eval", "bundle"])
def test_a_full_disk_and_then_a_larger_one(
    name: str, size: str, made: Made, quantkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """From nothing at all to nearly enough: whatever step the disk is full at."""
    with mounts.small_disk(tmp_path / "disk", size) as disk:
        monkeypatch.setenv("QUANTKIT_CACHE", str(disk / "cache"))
        done = quantkit(*words(made, name, disk / "out"))
        refused(done, "disk")
        assert not list(disk.rglob(artifacts.MANIFEST_NAME))
        mounts.resize(disk, "64m")
        done = quantkit(*words(made, name, disk / "out"))
        assert done.exit_code == 0, done.output
        assert list(whole_folders(disk)) == ["out"]
        if name == "quantize":
            assert same_bytes(disk / "out", made.target)


@pytest.mark.parametrize("size", ["16k", "100k"])
def test_a_full_disk_under_a_library_that_does_not_say_so(size: str, made: Made, quantkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """transformers writes the imported checkpoint, and has its own words for it."""
    with mounts.small_disk(tmp_path / "disk", size) as disk:
        refused(quantkit(*words(made, "run", disk / "out")), "the disk is full: free some space", "checkpoint")
        assert not list(disk.rglob(artifacts.MANIFEST_NAME))


def at_step(name: str, what: str, path: Path, command: Words) -> "subprocess.CompletedProcess[str]":
    driver = [sys.executable, "-m", "tests.faults.at_step", name, what, path, *command]
    return subprocess.run(
        [str(word) for word in driver], capture_output=True, text=True, timeout=600, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_a_disk_that_somebody_else_fills_meanwhile(made: Made, quantkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with mounts.small_disk(tmp_path / "disk", "32m") as disk:
        command = words(made, "quantize", disk / "out")
        done = at_step("layer-00001.safetensors", "fill", disk, command)
        assert done.returncode == 2 and "the disk is full: free some space" in done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr and not list(disk.rglob(artifacts.MANIFEST_NAME))
        layers = disk / "out" / ".partial" / "layers"
        assert (layers / "layer-00000.safetensors").is_file(), "what was finished is kept"
        (disk / "somebody-elses-file").unlink()
        assert quantkit(*command).exit_code == 0
        assert same_bytes(disk / "out", made.target)


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_cannot_be_written(name: str, made: Made, quantkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "folder"
    folder.mkdir()
    with mounts.read_only(folder):
        refused(quantkit(*words(made, name, folder / "out")), "the file system is read-only: choose another --out")
    assert not list(folder.iterdir())


def test_a_half_written_output_that_cannot_be_written_any_more(made: Made, quantkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.quantize.stream.write_checkpoint", _interrupted)
        assert quantkit(*words(made, "quantize", out)).exit_code == 130
    with mounts.read_only(out):
        refused(quantkit(*words(made, "quantize", out)), "the file system is read-only")
    assert quantkit(*words(made, "quantize", out)).exit_code == 0 and same_bytes(out, made.target)


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


LOST: dict[str, tuple[str, str, str]] = {
    # command, file, what is said
    "calibration text": ("quantize", "calibration.txt", "is not there: give a .txt, .md or .jsonl file"),
    "weights of the original": ("quantize", "model/model.safetensors", "has neither model.safetensors nor"),
    "config of the original": ("quantize", "model/config.json", "has no config.json"),
    "tokenizer of the original": ("quantize", "model/tokenizer.json", "has no usable tokenizer"),
    "held-out text": ("eval", "held_out.txt", "is not there: give a .txt, .md or .jsonl file"),
    "weights of the target": ("eval", "target/model.safetensors", "has neither model.safetensors nor"),
    "weights of the reference": ("eval", "model/model.safetensors", "has neither model.safetensors nor"),
    "tokenizer of the target": ("bundle", "target/tokenizer.json", "has no tokenizer.json"),
    "weights to bundle": ("bundle", "target/model.safetensors", "has no *.safetensors"),
    "model of the run": ("run", "tiny.gguf", "is not there: give the path of a .gguf file"),
    "prompts": ("run", "prompts.jsonl", "is not there: give a .txt, .md or .jsonl file"),
}


@pytest.mark.parametrize("lost", LOST)
def test_a_lost_input(lost: str, made: Made, quantkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    name, file, said = LOST[lost]
    path = made.folder / file
    kept = shutil.move(path, tmp_path / "kept")
    try:
        refused(quantkit(*words(made, name, tmp_path / "out")), said)
        assert not list(tmp_path.rglob(artifacts.MANIFEST_NAME))
    finally:
        shutil.move(kept, path)
    if name != "run":
        assert quantkit(*words(made, name, tmp_path / "out")).exit_code == 0


def test_an_input_that_is_lost_meanwhile(made: Made, quantkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = Path(shutil.copytree(made.checkpoint, tmp_path / "model"))
    command = words(made._replace(checkpoint=source), "quantize", tmp_path / "out")
    done = at_step("layer-00001.safetensors", "remove", source / "model.safetensors", command)
    assert done.returncode == 2 and "model.safetensors" in done.stderr, done.stderr[-2000:]
    assert "put it back and run the same command again" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / artifacts.MANIFEST_NAME).exists()
    shutil.copy(made.checkpoint / "model.safetensors", source)
    assert quantkit(*command).exit_code == 0
    assert same_bytes(tmp_path / "out", made.target)


@pytest.mark.parametrize("moved_s", [-20 * 365 * 86400, 20 * 365 * 86400], ids=["past", "future"])
def test_a_clock_that_moved(moved_s: int, made: Made, quantkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Whether something is fresh is a matter of digests: not of times, in either direction."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "tiny"))
    own = Made(folder, folder / made.recipe.name, folder / "model", folder / "target", folder / "bundle")
    for command in (words(own, "quantize", tmp_path / "out"), words(own, "eval", tmp_path / "report")):
        assert quantkit(*command).exit_code == 0
        for path in tmp_path.rglob("*"):
            then = path.stat().st_mtime + moved_s
            os.utime(path, (then, then))
        again = quantkit(*command)
        assert again.exit_code == 0 and "fresh" in again.stderr
    text = folder / "held_out.txt"
    before = text.stat()
    text.write_text(text.read_text().replace("harbour", "library"))
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))  # same time and size, other bytes
    again = quantkit(*words(own, "eval", tmp_path / "report"), "--fresh")
    assert again.exit_code == 0 and "fresh" not in again.stderr


@pytest.mark.parametrize("fresh", [False, True], ids=["", "fresh"])
@pytest.mark.parametrize("name", WRITERS)
def test_two_at_once(name: str, fresh: bool, made: Made, quantkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The second is refused at once; --fresh does not empty the folder under the first one's feet either."""
    out = tmp_path / "out"
    lock = out / "recipe-name.txt" if name == "run" else out / artifacts.PARTIAL_NAME / "lock"
    with artifacts.locked(lock, what=out):
        before = sorted(path.name for path in out.rglob("*"))
        done = quantkit(*words(made, name, out), *(["--fresh"] if fresh else []))
        refused(done, f"{out} is being written by another quantkit: wait for it, or give another --out")
        assert sorted(path.name for path in out.rglob("*")) == before


def test_a_second_one_does_not_replace_what_the_first_is_writing(made: Made, quantkit, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Other settings with --fresh: an artefact may be emptied, one that is being made may not."""
    out = tmp_path / "out"
    with artifacts.making(out, "quantized", inputs={}, settings={"another": True}) as work:
        (work.partial / "layer").write_text("hours of work")
        refused(quantkit(*words(made, "quantize", out), "--fresh"), "is being written by another quantkit")
        assert (work.partial / "layer").read_text() == "hours of work"
