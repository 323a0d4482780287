"""A Ray cluster: Ray Serve LLM on the bundle, with its prefix-cache router or one for the freest KV cache."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from quantkit import vllm_environment
from quantkit.serve import rendering
from quantkit.serve import settings as flags
from quantkit.serve.settings import DRAFT_DIR, TARGET_DIR, ServeSettings
from quantkit.serve.verdict import Check, of_problems
from quantkit.speculation import Profile

FOLDER = "ray"
PREFIX, MOST_FREE_KV = f"{FOLDER}/serve.yaml", f"{FOLDER}/serve.most-free-kv.yaml"
# Ray's processes work in folders of their own, so that paths must be whole; this one is replaced when it is started.
PLACE = "/bundle"

_ROUTERS = {PREFIX: "ray.serve.llm.request_router.PrefixCacheAffinityRouter", MOST_FREE_KV: "most_free_kv.MostFreeKV"}
_HEADING = f"""\
# Ray Serve LLM. On a machine of the cluster, with the bundle at the same path on all of them, from the bundle's folder:
#   sed "s#{PLACE}#$PWD#" %s > ../serve.yaml && serve run ../serve.yaml
# It answers /v1/models before a replica is up: wait for a completion. Ray Serve asks for no key.
"""


def files(settings: ServeSettings, record: Mapping[str, Any]) -> dict[str, str]:
    """Path in the bundle -> text."""
    texts = {name: text(settings, name) for name in _ROUTERS}
    return texts | {f"{FOLDER}/most_free_kv.py": rendering.render("ray/most_free_kv.py")}


def text(settings: ServeSettings, file: str, profile: Profile = "gpu") -> str:
    """One of the files, for `serve run`; those of a bundle are for GPUs."""
    on_cpu = profile == "cpu"
    environment = vllm_environment.settings(on_cpu=on_cpu)
    model: dict[str, Any] = {
        "model_loading_config": {
            "model_id": settings.served_model_name, "model_source": f"{PLACE}/{TARGET_DIR}",
        },
        "engine_kwargs": _engine(settings, profile),
        "deployment_config": {
            "num_replicas": settings.replicas,
            # Beyond these Ray holds requests back, where each can still go to any replica.
            "max_ongoing_requests": settings.max_num_seqs,
            # Until three of them have failed, a replica whose engine alone has died may still be sent requests.
            "health_check_period_s": 2,
            "request_router_config": {"request_router_class": _ROUTERS[file], "request_routing_stats_period_s": 1},
        },
    }  # fmt: skip
    if file == MOST_FREE_KV:
        model["server_cls"] = "most_free_kv.KVUsageServer"
        environment["PYTHONPATH"] = f"{PLACE}/{FOLDER}:${{PYTHONPATH}}"  # Ray fills it in
    if on_cpu:
        model["accelerator_config"] = {"kind": "cpu"}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # as many threads as Ray gives cores to the engine
    config = {
        "http_options": {"host": settings.host, "port": settings.port},
        "applications": [
            {
                "name": "llm", "route_prefix": "/", "import_path": "ray.serve.llm:build_openai_app",
                "runtime_env": {"env_vars": environment}, "args": {"llm_configs": [model]},
            }
        ],
    }  # fmt: skip
    return _HEADING % file + yaml.safe_dump(config, sort_keys=False, width=120)


def checks(bundle: Path) -> list[Check]:
    """Whether the files lead into the bundle, and ask for what vllm/serve.yaml asks for."""
    problems = []
    try:
        served = yaml.safe_load((bundle / flags.CONFIG_FILES["gpu"]).read_text(encoding="utf-8"))
        for file, router in _ROUTERS.items():
            (app,) = yaml.safe_load((bundle / file).read_text(encoding="utf-8"))["applications"]
            (model,) = app["args"]["llm_configs"]
            asked = model["engine_kwargs"]
            differs = [
                name for name, value in asked.items()
                if name != "speculative_config" and served.get(name.replace("_", "-")) != value
            ]  # fmt: skip
            if ("speculative_config" in asked) != ("speculative-config" in served):
                differs.append("speculative_config")
            problems += [f"{file}: {name} is another in {flags.CONFIG_FILES['gpu']}" for name in differs]
            if model["model_loading_config"]["model_source"] != f"{PLACE}/{TARGET_DIR}":
                problems.append(f"{file}: the model is not {PLACE}/{TARGET_DIR}")
            if model["deployment_config"]["request_router_config"]["request_router_class"] != router:
                problems.append(f"{file}: another router than {router}")
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{FOLDER} cannot be read ({type(error).__name__}: {error}): build the bundle again")
    return [of_problems(FOLDER, problems, good="the flags of vllm/serve.yaml, the bundle's own checkpoints")]


def _engine(settings: ServeSettings, profile: Profile) -> dict[str, Any]:
    arguments = flags.engine_arguments(settings, profile)
    if "speculative_config" in arguments:
        arguments["speculative_config"]["model"] = f"{PLACE}/{DRAFT_DIR}"
    return arguments
