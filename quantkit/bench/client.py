"""vLLM's own client, `vllm bench serve`, in a child that is started once: importing it takes longer than a load."""

import json
import shlex
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from quantkit import artifacts, processes, vllm_environment
from quantkit.bench.client_worker import JOB_NAME
from quantkit.errors import QuantkitError

_SAMPLE_S = 0.5  # between two looks at the server's gauges


class Asked(NamedTuple):
    """One call of `vllm bench serve`."""

    base_url: str
    model: str
    tokenizer: Path
    prompts: Path
    num_prompts: int
    concurrency: int
    temperature: float
    chat: bool

    def arguments(self, result: Path) -> list[str]:
        """As on its command line."""
        kind = ("openai-chat", "/v1/chat/completions") if self.chat else ("openai", "/v1/completions")
        return [
            "--backend", kind[0], "--base-url", self.base_url, "--endpoint", kind[1], "--model", self.model,
            "--tokenizer", str(self.tokenizer), "--dataset-name", "custom", "--dataset-path", str(self.prompts),
            "--custom-output-len", "-1", "--skip-chat-template", "--disable-shuffle",
            "--num-prompts", str(self.num_prompts), "--max-concurrency", str(self.concurrency),
            "--temperature", f"{self.temperature:g}", "--seed", "0", "--percentile-metrics", "ttft,tpot,itl,e2el",
            "--metric-percentiles", "50,95,99", "--ready-check-timeout-sec", "0", "--disable-tqdm",
            "--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name,
        ]  # fmt: skip

    def command(self) -> str:
        """As a shell takes it in the folder of the bench, against any server."""
        near = self._replace(
            base_url="http://127.0.0.1:8000", prompts=Path(self.prompts.parent.name, self.prompts.name)
        )
        shown = near.arguments(Path("result.json"))
        return shlex.join(["vllm", "bench", "serve", *shown])


class Answered(NamedTuple):
    """What the client saw, and what the server counted meanwhile.

    counted: by how much each of its counters rose. kv_usage: the largest share of the KV cache in use.
    """

    client: dict[str, Any]
    counted: dict[str, float]
    kv_usage: float


class Client:
    """The child, from its first load to the end of the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._worker: processes.Worker | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()

    def start(self) -> processes.Worker:
        """Start the child, unless it runs."""
        if self._worker is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            env = vllm_environment.process_environment(on_cpu=vllm_environment.is_cpu_build())
            command = [sys.executable, "-P", "-m", "quantkit.bench.client_worker"]
            self._worker = processes.Worker(command, env=env, log=self._folder / "client.log")
        return self._worker

    def run(self, asked: Asked, result: Path) -> Answered:
        """Put a load on a server; the client's own result stays in `result`.

        Raises:
            QuantkitError: the client failed, or a request did.
        """
        worker = self.start()
        artifacts.write_text(self._folder / JOB_NAME, json.dumps(asked.arguments(result)))
        before = scrape(asked.base_url)
        with _Watched(asked.base_url) as watched:
            done = worker.ask(str(self._folder.resolve()))
        if not done:
            self._worker = None
            raise QuantkitError(f"vllm bench serve failed: {processes.telling_line(worker.log)} (log: {worker.log})")
        seen = json.loads(result.read_bytes())
        if seen["failed"]:
            why = next((error for error in seen["errors"] if error), "no reason given")
            raise QuantkitError(f"{seen['failed']} of {asked.num_prompts} requests failed: {why.strip()[-300:]}")
        after = scrape(asked.base_url)
        counted = {name: value - before.get(name, 0.0) for name, value in after.items()}
        return Answered(seen, counted, watched.most)


def scrape(base_url: str) -> dict[str, float]:
    """The server's counters, summed over labels but for the position of a drafted token: `name@position`."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(_metrics(base_url)):
        if family.type != "counter":
            continue
        for sample in family.samples:
            if sample.name.endswith("_total"):
                place = sample.labels.get("position")
                name = sample.name.removeprefix("vllm:").removesuffix("_total") + (f"@{place}" if place else "")
                found[name] = found.get(name, 0.0) + sample.value
    return found


def _metrics(base_url: str) -> str:
    with httpx.Client(trust_env=False, timeout=30) as client:
        return client.get(f"{base_url}/metrics").text


class _Watched:
    """The server's KV usage, looked at while a load runs."""

    def __init__(self, base_url: str) -> None:
        self._base_url, self.most = base_url, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="quantkit-kv-usage")

    def __enter__(self) -> "_Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            try:
                told = _metrics(self._base_url)
            except httpx.TransportError:  # busy or gone: the client will say
                continue
            for line in told.splitlines():
                if line.startswith("vllm:kv_cache_usage_perc"):
                    self.most = max(self.most, float(line.rsplit(" ", 1)[1]))
