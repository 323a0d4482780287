"""A real process, really killed: what it makes the second time is what it makes undisturbed, on two threads too."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

NAMES = ("model.safetensors", "config.json")


def start(model: Path, out: Path, text: Path, *, threads: int) -> "subprocess.Popen[str]":
    command = [
        sys.executable, "-m", "quantkit.cli", "quantize", model, "--out", out, "--calibration", text, "--samples", "6",
        "--length", "128", "--group-size", "32",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> None:
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said[-2000:]


@pytest.fixture(scope="module")
def deep_llama(make_llama, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    path: Path = make_llama(tmp_path_factory.mktemp("deep") / "model", layers=12)
    return path


@pytest.fixture(scope="module")
def whole(deep_llama: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    finish(start(deep_llama, out, texts[0], threads=1))
    return out


def test_killed_and_started_again_gives_the_same_bytes(
    deep_llama: Path, texts: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    layers = out / ".partial" / "layers"
    process = start(deep_llama, out, texts[0], threads=1)
    begin_s = time.monotonic()
    while not (layers / "layer-00003.safetensors").exists():
        assert process.poll() is None and time.monotonic() - begin_s < 900
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in layers.glob("layer-*.safetensors")}
    assert 4 <= len(done) < 12, "it was killed too late for the test to mean anything"
    again = start(deep_llama, out, texts[0], threads=1)
    while again.poll() is None and not (layers / f"layer-{len(done):05d}.safetensors").exists():
        time.sleep(0.005)
    for name, made_ns in done.items():
        with suppress(FileNotFoundError):  # it has finished, and its layers are gone
            assert (layers / name).stat().st_mtime_ns == made_ns, "a finished layer was done again"
    finish(again)
    for name in NAMES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_two_threads_give_the_bytes_of_one(
    deep_llama: Path, texts: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    finish(start(deep_llama, tmp_path / "out", texts[0], threads=2))
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
