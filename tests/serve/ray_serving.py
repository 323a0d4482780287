"""A bundle's Ray Serve application on a cluster that a test started: from `serve run` to what its replicas count."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from quantkit.serve import ray_serve
from quantkit.serve.settings import ServeSettings

PATIENCE_S = 600  # of a machine that is busy with other things
SETTINGS = ServeSettings(
    served_model_name="tiny", max_model_len=8192, max_num_seqs=4, max_num_batched_tokens=8192,
    kv_cache_memory_bytes=24 << 20, num_speculative_tokens=2,
)  # fmt: skip


@contextmanager
def serving(
    cluster: Any, bundle: Path, file: str, server: str, *, settings: ServeSettings = SETTINGS, host: Any = None
) -> Iterator[httpx.Client]:
    """`serve run` on one of the files, made for a CPU, from when both replicas are there; here, or on a host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = settings.model_copy(update={"port": port})
    here = bundle.parent / "serve.yaml"
    here.write_text(ray_serve.text(settings, file, "cpu").replace(ray_serve.PLACE, str(bundle)))
    log = bundle.parent / f"{server}.log"
    # Serve ends, and gives up its port, with who hears SIGINT; what was started in the background may not.
    command = ["env", "--default-signal=INT", Path(sys.executable).with_name("serve"), "run", here, "--address",
               cluster.address]  # fmt: skip
    with log.open("w") as stream, on(host):
        process = subprocess.Popen(
            [str(word) for word in command], stdout=stream, stderr=stream, start_new_session=True
        )  # fmt: skip

    def started() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        return num_started(cluster, server) == 2

    def answers() -> bool:  # Serve's proxy may come after the replicas
        with suppress(httpx.TransportError), on(host):
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


def on(host: Any) -> Any:
    """What this thread opens in the block, it opens on a host; None: here."""
    return host.inside() if host else nullcontext()


def num_started(cluster: Any, server: str) -> int:
    """How many replicas have been started since the cluster was."""
    said = "".join(path.read_text() for path in (cluster.logs[0] / "serve").glob("controller_*.log"))
    return len(re.findall(rf"deployment='{server}:tiny', .*started successfully", said))


def ask(client: httpx.Client, content: str, max_tokens: int = 4) -> str:
    asked = {"model": "tiny", "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True,
             "messages": [{"role": "user", "content": content}]}  # fmt: skip
    answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == max_tokens
    return str(answer.json()["choices"][0]["message"]["content"])


def by_replica(cluster: Any, metric: str) -> Counter[str]:
    """A metric of vLLM by replica, as Ray shows it."""
    found: Counter[str] = Counter()
    for url in cluster.metrics_urls:
        text = httpx.get(url, trust_env=False, timeout=PATIENCE_S).text
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
