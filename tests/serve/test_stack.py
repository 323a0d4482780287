"""What compose.yaml of a bundle starts, really started: two vLLM on the CPU, smg, nginx, Prometheus.

There is no container here. Each service's own entrypoint, command, environment and mounted files are taken from the
bundle, and nothing is changed in them but where the containers' names, ports and paths become this machine's.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from quantkit import artifacts, vllm_environment
from quantkit.serve import bundle as bundles
from quantkit.serve import compose, observability, processor, smoke
from quantkit.serve.settings import CONFIG_FILES, ServeSettings
from quantkit.serve.verdict import find_tool

TOOLS = {"smg": "quantkit[compose]", "nginx": "Debian package nginx", "prometheus": "Debian package prometheus"}
MISSING = [f"{name} ({install})" for name, install in TOOLS.items() if find_tool(name) is None]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

# A cache so small that one replica's is seen to fill: 4096 tokens of target and draft.
SETTINGS = ServeSettings(
    served_model_name="tiny", max_model_len=2048, max_num_seqs=4, max_num_batched_tokens=1024, dtype="float32",
    num_speculative_tokens=4, kv_cache_memory_bytes=8 << 20,
)  # fmt: skip
PORTS = {"vllm-0": (8000,), "vllm-1": (8000,), "router": (30000, 29000), "proxy": (8080,), "prometheus": (9090,)}
HEALTH = {"vllm": "/health", "router": "/readiness"}


class Stack(NamedTuple):
    """Where everything answers, the key, and the folder of every log."""

    bundle: Path
    ports: dict[tuple[str, int], int]
    processes: dict[str, "subprocess.Popen[bytes]"]
    key: str
    logs: Path

    def url(self, service: str, port: int) -> str:
        return f"http://127.0.0.1:{self.ports[service, port]}"

    def outside(self, key: str | None = None) -> httpx.Client:
        """A client of the one published port, with the key unless told otherwise."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"} if key != "" else {}
        return httpx.Client(base_url=self.url("proxy", 8080), headers=headers, timeout=300, trust_env=False)

    def counters(self, service: str) -> dict[str, float]:
        return smoke.read_counters(httpx.get(f"{self.url(service, 8000)}/metrics", trust_env=False, timeout=120).text)

    def ask_prometheus(self, expr: str) -> list[dict[str, Any]]:
        query = f"{self.url('prometheus', 9090)}/api/v1/query"
        answer = httpx.get(query, params={"query": expr}, trust_env=False, timeout=120).raise_for_status().json()
        return list(answer["data"]["result"])


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose draft is the target itself, and says that all it proposed was accepted."""
    folder = tmp_path_factory.mktemp("stack")
    counted = {"0": {"vllm": {"per_position": [1.0] * 4}}}
    with artifacts.making(folder / "draft", "draft", inputs={}, settings={}) as work:
        shutil.copytree(tiny_llama, folder / "draft", dirs_exist_ok=True)
        work.results.update(acceptance={"after": counted})
    with artifacts.making(folder / "bundle", "bundle", inputs={}, settings=SETTINGS.model_dump()) as work:
        bundles.build(
            work, target=tiny_llama, draft=folder / "draft", report=None, settings=SETTINGS, sources={}
        )  # fmt: skip
    return folder / "bundle"


@pytest.fixture(scope="module")
def stack(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    scratch = tmp_path_factory.mktemp("run")
    key = secrets.token_hex(16)
    (scratch / "api_key").write_text(key + "\n")
    services = yaml.safe_load((bundle / "compose.yaml").read_text())["services"]
    ports = {(name, port): _free_port() for name, numbers in PORTS.items() for port in numbers}
    running = Stack(bundle, ports, {}, key, scratch)
    # Whoever ends this run from outside ends what it started too: it stands in sessions of its own.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for name in PORTS:
            for other in services[name].get("depends_on", {}):
                url = running.url(other, PORTS[other][0]) + HEALTH[other.split("-")[0]]
                _wait(lambda url=url: _answers(url), running, 900)  # type: ignore[misc]
            running.processes[name] = _start(running, name, services[name], scratch)
        _wait(lambda: _answers(f"{running.url('proxy', 8080)}/health"), running, 300)
        yield running
    finally:
        _end(running.processes)
        signal.signal(signal.SIGTERM, before)


def _end(processes: dict[str, "subprocess.Popen[bytes]"]) -> None:
    for process in reversed(processes.values()):
        process.terminate()
    for process in processes.values():
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start(stack: Stack, name: str, service: dict[str, Any], scratch: Path) -> "subprocess.Popen[bytes]":
    """One service of compose.yaml as a process: its words and files, with this machine's addresses and paths."""
    folder = scratch / name
    folder.mkdir()

    def here(text: str, own: bool = True) -> str:
        for (other, port), number in stack.ports.items():
            text = text.replace(f"{other}:{port}", f"127.0.0.1:{number}")
            if own and other == name:
                text = re.sub(rf"\b{port}\b", str(number), text)
        return text.replace("0.0.0.0", "127.0.0.1")

    paths = {"/run/secrets": str(scratch), "/tmp": str(folder)}
    for volume in service.get("volumes", []):
        source = stack.bundle / volume["source"]
        copy = folder / Path(volume["target"]).name
        if volume["type"] == "volume":
            copy.mkdir()
        elif name == "prometheus":
            shutil.copytree(source, copy)
        elif source.is_file():
            shutil.copy(source, copy)
        paths[volume["target"]] = str(copy if copy.exists() else source)
        for file in [copy] if copy.is_file() else copy.glob("*") if copy.exists() else []:
            file.write_text(_moved(here(file.read_text(), own=name == "proxy"), {"/tmp": str(folder)}))
    words = [_moved(here(word), paths) for word in (*service["entrypoint"], *service["command"])]
    environment = {key: _moved(value, paths) for key, value in service.get("environment", {}).items()}
    program = sys.executable if words[0] == "python3" else find_tool(words[0])
    assert program is not None
    if name.startswith("vllm"):
        words = [CONFIG_FILES["cpu"] if word == CONFIG_FILES["gpu"] else word for word in words]
        words += [flag for one in processor.substitutes(stack.bundle) for flag in one.flags]
        environment = vllm_environment.process_environment(on_cpu=True) | environment
        cores = sorted(os.sched_getaffinity(0))  # one each: bound to the same, the idle one waits for the loaded one
        environment["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[int(name[-1]) % len(cores)])
    if name == "proxy" and os.geteuid() == 0:
        words += ["-g", "user root;"]
    with (scratch / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [program, *words[1:]], cwd=paths.get(service.get("working_dir", ""), folder), stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"]} | environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _moved(text: str, paths: dict[str, str]) -> str:
    """Every path of the container as it is here; in one go, as paths here may begin as those there do."""
    there = "|".join(map(re.escape, sorted(paths, key=len, reverse=True)))
    return re.sub(rf"(?<![\w/.-])(?:{there})(?=[/\s]|$)", lambda found: paths[found[0]], text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False).status_code == 200
    return False


def _wait(done: Callable[[], bool], stack: Stack, timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while not done():
        ended = {name: process.poll() for name, process in stack.processes.items() if process.poll() is not None}
        tails = {name: (stack.logs / f"{name}.log").read_text(errors="replace")[-2000:] for name in ended}
        assert not ended, f"ended by themselves: {ended}\n{tails}"
        assert time.monotonic() < end_s, f"not within {timeout_s} s"
        time.sleep(0.5)


def chat(prompt: str = "Count from one to ten.", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": 16} | more


def test_a_chat_is_answered_whole_and_streamed_as_it_comes(stack: Stack) -> None:
    asked = chat(max_tokens=60, ignore_eos=True)
    with stack.outside() as client:
        whole = client.post("/v1/chat/completions", json=asked).raise_for_status().json()
        for _ in range(5):  # where this process is late to read, it finds all pieces at once
            with client.stream("POST", "/v1/chat/completions", json=asked | {"stream": True}) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                pieces = list(response.iter_raw())
            events = [line for line in b"".join(pieces).decode().splitlines() if line.startswith("data: {")]
            deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
            assert "".join(delta.get("content") or "" for delta in deltas) == whole["choices"][0]["message"]["content"]
            if len(pieces) > 1:
                break
    # less than a page of a proxy's, in pieces; test_compose shows that the proxy holds nothing back
    assert len(b"".join(pieces)) < 4096 and len(pieces) > 1


@pytest.mark.parametrize(
    "path", ["/invocations", "/tokenize", "/metrics", "/load", "/workers", "/key", "/v1/embeddings", "/v1/models/", "/"]
)
def test_other_paths_are_closed(stack: Stack, path: str) -> None:
    with stack.outside() as client:
        assert client.get(path).status_code == 404
        assert client.post(path, json=chat()).status_code == 404


@pytest.mark.parametrize("key", ["", "another"])
def test_who_has_no_key_gets_no_answer(stack: Stack, key: str) -> None:
    with stack.outside(key) as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 401
        assert client.post("/v1/completions", json={"model": "tiny", "prompt": "a"}).status_code == 401
        assert client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == 200
    for service in ("vllm-0", "vllm-1"):  # nor does who comes past the router
        url = f"{stack.url(service, 8000)}/v1/chat/completions"
        assert httpx.post(url, json=chat(), trust_env=False, timeout=300).status_code == 401


def test_models_are_listed(stack: Stack) -> None:
    with stack.outside() as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]


def test_the_loaded_replica_is_avoided(stack: Stack) -> None:
    """One replica is loaded behind the router's back, which can know it by what the replica counts alone."""
    stop = threading.Event()

    def load(number: int) -> None:
        url, headers = stack.url("vllm-0", 8000), {"Authorization": f"Bearer {stack.key}"}
        # of other lengths, so that they do not end together and leave the replica free for a moment
        body = chat("harbour " * 40, max_tokens=900 - 170 * number, ignore_eos=True)
        while not stop.is_set():  # each on a connection of its own: the server may be closing one that has answered
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, trust_env=False, timeout=300)
            answer.raise_for_status()

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, number) for number in range(4)]
        try:
            _wait(lambda: stack.counters("vllm-0")["vllm:kv_cache_usage_perc"] > 0.2, stack, 300)
            with stack.outside() as client:
                before = stack.counters("vllm-1")["vllm:prompt_tokens_total"]
                tokens = []
                for n in range(14):
                    # One for each of the router's looks, which are a second apart: whom it has sent something since, it
                    # holds for half a second busier, and a fast replica would be given every other one of several.
                    time.sleep(1.5)
                    answer = client.post("/v1/chat/completions", json=chat(f"{n} ships")).raise_for_status().json()
                    tokens.append(answer["usage"]["prompt_tokens"])
            # All but two, for a machine so busy that the router is late: one that does not look sends 12 of 14 there
            # once in 150 times. A replica counts an answer when it has given it.
            most = sum(sorted(tokens)[:12])
            _wait(lambda: stack.counters("vllm-1")["vllm:prompt_tokens_total"] - before >= most, stack, 30)
        finally:
            stop.set()
        for each in loads:
            each.result()


def test_a_cache_aware_router_sends_a_prefix_where_it_is(stack: Stack) -> None:
    """The other router of a recipe, before the same replicas."""
    name, settings = "router", SETTINGS.model_copy(update={"router": "cache_aware"})
    text = compose.files(settings, bundles.read_bundle(stack.bundle))["compose.yaml"]
    ports = stack.ports | {("router", port): _free_port() for port in PORTS["router"]}
    other = stack._replace(ports=ports, processes={}, logs=stack.logs / "cache_aware")
    other.logs.mkdir()
    (other.logs / "api_key").write_text(stack.key)
    other.processes[name] = _start(other, name, yaml.safe_load(text)["services"][name], other.logs)
    try:
        _wait(lambda: _answers(f"{other.url(name, 30000)}/readiness"), other, 300)
        headers = {"Authorization": f"Bearer {stack.key}"}
        hits = {one: stack.counters(one)["vllm:prefix_cache_hits_total"] for one in ("vllm-0", "vllm-1")}
        for n in range(6):
            url = f"{other.url(name, 30000)}/v1/chat/completions"
            body = chat("The town has a harbour. " * 12 + f"How many of them are {n}?")
            httpx.post(url, json=body, headers=headers, timeout=300, trust_env=False).raise_for_status()
        grown = [stack.counters(one)["vllm:prefix_cache_hits_total"] - hits[one] for one in hits]
    finally:
        _end(other.processes)
    assert min(grown) == 0 and max(grown) >= 5 * 64  # one replica has seen all six, and computed the beginning once


def test_prometheus_sees_every_replica_and_every_rule_gives_a_number(stack: Stack) -> None:
    headers = {"Authorization": f"Bearer {stack.key}"}
    for name in ("vllm-0", "vllm-1"):
        for n in range(3):
            url = f"{stack.url(name, 8000)}/v1/chat/completions"
            httpx.post(url, json=chat(f"{n} libraries", max_tokens=64), headers=headers, timeout=300, trust_env=False)
    replicas = {f"127.0.0.1:{stack.ports[name, 8000]}" for name in ("vllm-0", "vllm-1")}
    router = f"127.0.0.1:{stack.ports['router', 29000]}"
    expressions = observability.expressions(stack.bundle / "observability")
    recorded = [name for name in expressions if name.startswith("quantkit:")]
    assert len(recorded) == 15

    def numbers(name: str) -> set[str]:
        return {one["metric"]["instance"] for one in stack.ask_prometheus(name) if one["value"][1] != "NaN"}

    _wait(lambda: all(numbers(name) == replicas for name in recorded), stack, 300)
    _wait(lambda: numbers("up == 1") == {*replicas, router}, stack, 300)
    for name, expr in expressions.items():
        if name.startswith("panel"):
            assert stack.ask_prometheus(expr), f"{name}: nothing to draw of {expr}"
    rates = stack.ask_prometheus("quantkit:acceptance_rate")
    assert [float(one["value"][1]) for one in rates] == pytest.approx([1.0, 1.0])
    assert stack.ask_prometheus('ALERTS{alertname=~"AcceptanceDrift|ReplicaDown",alertstate="firing"}') == []


def test_every_name_in_rules_and_dashboard_is_the_servers(stack: Stack) -> None:
    assert stack.counters("vllm-0").keys() >= observability.METRICS | observability.DRAFT_METRICS


def test_the_key_is_in_no_log_and_no_argument(stack: Stack) -> None:
    logs = {
        path.relative_to(stack.logs).as_posix(): path.read_text(errors="replace") for path in stack.logs.rglob("*.log")
    }
    assert len(logs) == 6 and all(logs[name] for name in ("vllm-0.log", "router.log", "proxy.log"))
    assert [name for name, text in logs.items() if stack.key in text] == []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            assert stack.key.encode() not in path.read_bytes()
    for path in stack.bundle.rglob("*"):
        assert not path.is_file() or stack.key.encode() not in path.read_bytes()


def test_who_asks_too_often_is_held_back(stack: Stack) -> None:
    with stack.outside() as client, ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda _: client.get("/v1/models").status_code, range(100)))
    assert {*codes} == {200, 429}
