"""The smoke test as a bundle carries it, and the load, against real servers; and what the smoke test must notice."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quantkit import vllm_environment
from quantkit.serve import asking, launch, smoke
from quantkit.serve.settings import ServeSettings

MakeBundle = Callable[..., Path]
SETTINGS = ServeSettings(
    served_model_name="tiny", max_model_len=512, max_num_seqs=4, max_num_batched_tokens=512, num_speculative_tokens=2,
    kv_cache_memory_bytes=16 << 20, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tiny_llama, tmp_path_factory.mktemp("asked") / "bundle", SETTINGS)


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[launch.Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "the-key-of-this-test")
        with launch.serving(bundle, profile="cpu", log=tmp_path_factory.mktemp("log") / "vllm.log") as running:
            yield running


def _smoke(bundle: Path, *words: str, key: str | None) -> "subprocess.CompletedProcess[str]":
    """As a stranger runs it: another Python than quantkit's would do, with an environment of its own."""
    environment = {"PATH": os.environ["PATH"]} | ({"VLLM_API_KEY": key} if key else {})
    command = [sys.executable, "-I", "-S", str(bundle / asking.SMOKE), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.vllm
def test_the_bundles_own_script_asks_a_real_server(bundle: Path, server: launch.Server) -> None:
    run = _smoke(bundle, server.base_url, "--metrics", server.base_url, key="the-key-of-this-test")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert all(line.startswith("ok     ") for line in lines)
    for said in (
        "files unchanged",
        "serves tiny",
        "streams equal",
        "prompt tokens found again",
        "with a wrong one 401",
    ):
        assert said in run.stdout
    assert "speculation: " in run.stdout and "the-key-of-this-test" not in run.stdout


@pytest.mark.vllm
def test_what_is_not_as_promised_fails(bundle: Path, server: launch.Server, tmp_path: Path) -> None:
    """vLLM alone leaves paths open that a proxy closes; without a key it answers nothing; a changed file is named."""
    run = _smoke(bundle, server.base_url, "--proxied", "--no-sums", key="the-key-of-this-test")
    assert run.returncode == 1 and "FAILED closed paths: /invocations answers" in run.stdout
    run = _smoke(bundle, server.base_url, "--no-sums", key=None)
    assert run.returncode == 1 and "answered 401" in run.stdout
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "vllm" / "serve.yaml").open("a") as stream:
        stream.write("#")
    run = _smoke(copy, "http://127.0.0.1:9", key=None)
    assert run.returncode == 1 and "FAILED SHA256SUMS: changed: vllm/serve.yaml" in run.stdout
    assert "FAILED the server answers: http://127.0.0.1:9 cannot be reached" in run.stdout


@pytest.mark.vllm
def test_the_load_runs_and_leaves_its_figures(bundle: Path, server: launch.Server, tmp_path: Path) -> None:
    environment = vllm_environment.process_environment(on_cpu=True) | {
        "VLLM_API_KEY": "the-key-of-this-test", "RESULTS": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    run = subprocess.run(
        ["sh", str(bundle / asking.LOAD), server.base_url, "2"], env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-2000:]
    found = json.loads((tmp_path / "load-2.json").read_text())
    assert found["completed"] == 32 and found["failed"] == 0 and found["max_concurrency"] == 2
    assert found["p99_ttft_ms"] > 0 and found["total_output_tokens"] > 0


def test_counters_are_summed_over_labels() -> None:
    text = '# HELP x\nvllm:a_total{engine="0",model_name="m"} 3.0\nvllm:a_total{engine="1",model_name="m"} 4\nb 1e2\n'
    assert smoke.read_counters(text) == {"vllm:a_total": 7.0, "b": 100.0}
