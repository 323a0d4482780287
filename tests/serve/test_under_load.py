"""The real server with more to do than it can, and with clients that go away: the short form of faults/soak.py."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quantkit.serve import launch, smoke
from quantkit.serve.settings import ServeSettings
from tests.faults import soak

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
SETTINGS = ServeSettings(
    served_model_name="tiny", max_model_len=2048, max_num_seqs=4, max_num_batched_tokens=1024, num_speculative_tokens=2,
    kv_cache_memory_bytes=32 << 20, dtype="float32", max_num_queued_reqs=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tiny_llama, tmp_path_factory.mktemp("load") / "bundle", SETTINGS)


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[launch.Server]:
    with launch.serving(bundle, profile="cpu", log=tmp_path_factory.mktemp("log") / "vllm.log") as running:
        yield running


def _counted(server: launch.Server) -> dict[str, float]:
    return smoke.read_counters(httpx.get(f"{server.base_url}/metrics", trust_env=False, timeout=60).text)


def _chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "ignore_eos": True} | more


def _eventually(true: Callable[[], bool], patience_s: float = 60) -> bool:
    end_s = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


def test_who_goes_away_frees_the_cache(server: launch.Server) -> None:
    """Long before the answer would have been whole; of the others none is touched."""
    before = _counted(server)["vllm:generation_tokens_total"]
    body = _chat(max_tokens=1800, n=4, temperature=1.0, stream=True)
    with (
        httpx.Client(base_url=server.base_url, trust_env=False, timeout=300) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        lines = response.raise_for_status().iter_lines()  # kept: with it the connection is closed
        next(lines)
        assert _eventually(lambda: _counted(server)["vllm:kv_cache_usage_perc"] > 0)
    idle = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    assert _eventually(lambda: not any(_counted(server)[name] for name in idle)), _counted(server)
    assert 0 < _counted(server)["vllm:generation_tokens_total"] - before < 4 * 1800
    answer = httpx.post(
        f"{server.base_url}/v1/chat/completions", json=_chat(max_tokens=4), trust_env=False, timeout=300
    )
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_past_its_queue_it_says_503_at_once(server: launch.Server) -> None:
    with httpx.Client(base_url=server.base_url, trust_env=False, timeout=300) as client:
        streams: list[httpx.Response] = []
        try:
            while len(streams) < 40:  # on a fast processor the first ones may be answered while others are sent
                request = client.build_request("POST", "/v1/chat/completions", json=_chat(max_tokens=1800, stream=True))
                begin_s = time.monotonic()
                streams.append(client.send(request, stream=True))
                if streams[-1].status_code != 200:
                    break
            refused = streams[-1]
            assert refused.status_code == 503 and time.monotonic() - begin_s < 10
            assert json.loads(refused.read())["error"]["code"] == 503
            assert len(streams) > 8, "fewer are taken than its limit"
        finally:
            for stream in streams:
                stream.close()
        assert _eventually(lambda: not _counted(server)["vllm:num_requests_running"])


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("file", ["draft/model.safetensors", "target/model.safetensors"])
def test_a_bundle_damaged_after_it_was_made_is_not_started(
    bundle: Path, tmp_path: Path, file: str, probe: bool
) -> None:
    damaged = shutil.copytree(bundle, tmp_path / "bundle")
    with (damaged / file).open("r+b") as stream:
        stream.seek(-2, 2)
        byte = stream.read(1)
        stream.seek(-2, 2)
        stream.write(bytes([byte[0] ^ 1]))
    command = [sys.executable, "-m", "quantkit.cli", "serve", "up", str(damaged), "--log", str(tmp_path / "log")]
    run = subprocess.run(
        [*command, *(["--probe"] if probe else [])], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 2 and f"is not started, SHA256SUMS: {file} has changed" in run.stderr.replace("\n", " ")
    assert not (tmp_path / "log").exists()  # of vLLM


def test_twice_the_load_it_takes_is_answered_or_refused(bundle: Path, tmp_path: Path) -> None:
    found = soak.soak_bundle(bundle, tmp_path / "vllm.log", seconds=40, measured_s=10)
    # In so short a time memory says nothing: buffers still grow to what such a load takes. Other tests run beside it.
    told = json.dumps({name: value for name, value in found.items() if name != "samples"})
    assert soak.faults(found, refused_within_s=15.0, growth=1.0) == [], told
