"""Work over two hosts, a rank on each: what one process makes, though one of them is killed midway."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantkit import conversations
from quantkit.checkpoint import open_checkpoint

QUANTKIT = Path(sys.executable).with_name("quantkit")
ROOT = Path(__file__).parents[1]
PATIENCE_S = 900  # of a machine that is busy with other things
Hosts = Any  # of hosts.py, which cannot be imported
OnBoth = Callable[..., "list[subprocess.Popen[str]]"]


@pytest.fixture(scope="module")
def deep_llama(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers enough to be killed between them."""
    return make_llama(tmp_path_factory.mktemp("deep") / "model", layers=6)


def _said(process: "subprocess.Popen[str]") -> str:
    said: str = process.communicate(timeout=PATIENCE_S)[1]
    return said


def _wait(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_quantize_over_two_hosts_goes_on_after_a_rank_was_killed(
    hosts: Hosts, on_both: OnBoth, deep_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    def command(out: Path) -> list[object]:
        sizes = ("--samples", 6, "--length", 64, "--group-size", 32, "--effort", "fast")
        return [QUANTKIT, "quantize", deep_llama, "--out", out, "--calibration", texts[0], *sizes]

    alone, both = tmp_path / "alone", tmp_path / "both"
    subprocess.run([str(word) for word in command(alone)], check=True, timeout=PATIENCE_S)
    layers = both / ".partial" / "layers"
    first = on_both(hosts, *command(both), stderr=subprocess.PIPE)
    _wait(lambda: first[0].poll() is not None or (layers / "layer-00001.safetensors").exists())
    hosts[1].kill(f"{QUANTKIT.with_name('python')}\0{QUANTKIT}\0quantize")
    said = _said(first[0])
    assert first[0].returncode and "error: rank 0 waited for another one that is gone" in said, said[-3000:]
    assert "start the same command again" in said and not (both / "quantkit.json").exists()
    _said(first[1])
    done = sorted(path.name for path in layers.glob("layer-*"))
    assert done and len(done) < 6
    stored = {name: (layers / name).stat().st_mtime_ns for name in done}

    again = on_both(hosts, *command(both), stderr=subprocess.PIPE)
    said = [_said(process) for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert not stored or (both / "quantkit.json").exists()
    one, two = (open_checkpoint(path, quantized=True) for path in (alone, both))
    for index in range(one.arch.num_layers):
        for name, tensor in one.layer(index).items():  # as in quantize/test_ranks.py
            assert (tensor != two.layer(index)[name]).float().mean() < 0.02, (index, name)
            assert (tensor - two.layer(index)[name]).abs().max() <= 0.2 * tensor.abs().max()
    assert all(torch.equal(tensor, two.outer()[name]) for name, tensor in one.outer().items())


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_accelerate_over_two_hosts_learns_what_one_process_does(
    sharded: bool, hosts: Hosts, alone_learned: dict[str, Any], tmp_path: Path
) -> None:
    out, target, exchanges = tmp_path / "out", alone_learned["target"], alone_learned["exchanges"]
    out.mkdir()
    how = ("--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
    ranks = [
        host.start(
            sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", 2,
            "--num_processes", 2, "--machine_rank", rank, "--main_process_ip", hosts[0].address,
            "--main_process_port", 29500, "--mixed_precision", "no", "--dynamo_backend", "no",
            *(how if sharded else ("--multi_gpu",)), "-m", "tests.draft.along", target, exchanges, out, cwd=ROOT,
            stderr=subprocess.PIPE, env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip
    said = [_said(process) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    found = json.loads((out / "training.json").read_text())
    assert found["losses"] == pytest.approx(alone_learned["losses"], rel=0.005)  # gradients of bfloat16 products
    assert found["steps"] == alone_learned["steps"]
    one, two = load_file(alone_learned["weights"]), load_file(found["weights"])
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # as in draft/test_train.py
        assert float((tensor - two[name]).norm()) < 0.01 * float(tensor.norm()), name


@pytest.fixture(scope="module")
def alone_learned(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process learns, of what."""
    folder = tmp_path_factory.mktemp("alone")
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, 320, (count,), generator=generator).tolist()

    texts = [conversations.Exchange([0, *tokens(3 + n % 4)], tokens(6 + 5 * n % 17)) for n in range(12)]
    target, exchanges, out = make_llama(folder / "model", layers=4), folder / "exchanges.jsonl", folder / "out"
    conversations.save_exchanges(exchanges, texts)
    out.mkdir()
    subprocess.run([sys.executable, "-m", "tests.draft.along", target, exchanges, out], cwd=ROOT, check=True)
    return json.loads((out / "training.json").read_text()) | {"target": target, "exchanges": exchanges}


def test_eval_over_two_hosts_says_what_one_process_says(
    hosts: Hosts, on_both: OnBoth, drifted_llama: Path, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An odd number of windows, and a gate that fails: the other rank goes home and does not call that a loss."""

    def command(out: Path) -> list[object]:
        monkeypatch.setenv("QUANTKIT_CACHE", str(out.with_suffix(".cache")))  # what the reference made of the windows
        sizes = ("--samples", 5, "--length", 64, "--chat", "no", "--kv-cache", "fp8")
        return [QUANTKIT, "eval", drifted_llama, "--reference", tiny_llama, "--out", out, "--text", texts[1], *sizes]

    alone, both = tmp_path / "alone", tmp_path / "both"
    assert subprocess.run([str(word) for word in command(alone)], timeout=PATIENCE_S).returncode == 8
    ranks = on_both(hosts, *command(both), stderr=subprocess.PIPE)
    said = [_said(process) for process in ranks]
    assert "must not be served" in said[0] and "is gone" not in said[1], said
    one, two = (json.loads((path / "report.json").read_bytes())["candidates"][0] for path in (alone, both))
    assert one["by_layer"] == pytest.approx(two["by_layer"], rel=1e-3)
    for name in ("on", "cache"):
        assert _numbers(one[name]) == pytest.approx(_numbers(two[name]), rel=1e-3, abs=1e-6)


def _numbers(found: Any) -> list[float]:
    """All numbers of a report, in its order."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        return [number for each in found for number in _numbers(each)]
    return [float(found)] if isinstance(found, int | float) else []
