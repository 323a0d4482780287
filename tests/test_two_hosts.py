"""Work over two hosts, a rank or an engine on each: what one process makes, though one of them is killed midway."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint import open_checkpoint
from quantkit.offline import RESULTS_NAME, Job, Request, Session

QUANTKIT = Path(sys.executable).with_name("quantkit")
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


@pytest.mark.vllm
@pytest.mark.timeout(4 * PATIENCE_S)
def test_each_prompt_is_answered_once_though_an_engine_and_then_its_host_die(
    hosts: Hosts, start_ray: Callable[..., Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """With room for one engine on each host: what the dead one had can go nowhere but to the one that is left."""
    requests = [Request(name=f"answer-{i}", prompt=[3, *divmod(i, 16), 7], max_tokens=400) for i in range(128)]
    job = Job(model=str(tiny_llama), requests=requests, max_model_len=512, max_num_seqs=16)
    killed: list[str] = []
    with start_ray(num_cpus=1, hosts=hosts) as cluster, hosts[0].inside():

        def kill(done: int, total: int) -> None:
            engines = cluster.processes(b"EngineCore", node=1)
            if done >= 16 and not killed and engines:
                os.kill(engines.pop(), signal.SIGKILL)
                killed.append(f"the engine, with {done} answered")
            elif done >= 48 and len(killed) == 1:
                for process in cluster.processes(node=1):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                killed.append(f"the host, with {done} answered")

        with Session(cluster=cluster.address) as session:
            found, _ = session.run(job, tmp_path, on_result=kill)
    assert len(killed) == 2, killed
    names = [json.loads(line)["name"] for line in (tmp_path / RESULTS_NAME).read_text().splitlines()]
    assert sorted(names) == sorted(request.name for request in requests), "each once"
    assert all(len(result.tokens) == 400 for result in found)
