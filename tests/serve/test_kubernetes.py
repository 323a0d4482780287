"""The Kubernetes files, rendered by the real kustomize and held against the schemas of those who wrote the kinds."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from quantkit import vllm_environment
from quantkit.serve import kubernetes, observability
from quantkit.serve.compose import VLLM_FLOOR
from quantkit.serve.settings import ServeSettings, problems

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="requirements/test.txt is not installed")

SCHEMAS = Path(__file__).parent / "schemas"
RECORD = {"files": {"target/model.safetensors": {"size": 40 << 30, "sha256": "0"}}, "engine": "vllm 0.32.0"}
ONE_NODE = ServeSettings(served_model_name="Llama-3.3_70B", max_model_len=8192, tensor_parallel_size=4, replicas=3)
TWO_NODES = ONE_NODE.model_copy(update={"tensor_parallel_size": 16})
DIGEST = "sha256:" + "0123456789abcdef" * 4

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="no kubectl: apt-get install kubernetes-client"
)


def write(folder: Path, settings: ServeSettings) -> Path:
    """The Kubernetes part of a bundle."""
    for name, text in kubernetes.files(settings, RECORD).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def render(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder."""
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def strict(node: Any) -> Any:
    """A schema that refuses fields it does not name, where a cluster would drop them without a word."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {k: {n: strict(f) for n, f in v.items()} if k == "properties" else strict(v) for k, v in node.items()}
    if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def validate(found: dict[str, Any]) -> None:
    """Hold an object against its schema, and each pod in a custom resource against Kubernetes' own."""
    own = SCHEMAS / f"{found['kind']}.json"
    if not own.is_file():
        for version in ("1.25", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(found, version, strict=True)
        return
    jsonschema.validate(found, strict(json.loads(own.read_text())))
    for pod in kubernetes._pods(found):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def places(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in an object that has named fields of a schema: not labels, queries and the like."""
    if isinstance(value, dict):
        if value and not {"apiVersion", "name"}.isdisjoint(value) and "query" not in value:
            yield value
        for key, inner in value.items():
            if key not in ("labels", "matchLabels", "inline", "metadata", "selector"):
                yield from places(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from places(inner)


@needs_kubectl
@pytest.mark.parametrize(
    ("settings", "folder", "kinds"),
    [
        (ONE_NODE, "base", "Deployment NetworkPolicy PersistentVolumeClaim PodDisruptionBudget Service"),
        (ONE_NODE, "autoscaling", "Deployment NetworkPolicy PersistentVolumeClaim PodDisruptionBudget ScaledObject "
         "Service ServiceMonitor"),
        (ONE_NODE, "kserve", "LLMInferenceService"),
        (TWO_NODES, "multi-node", "LeaderWorkerSet NetworkPolicy NetworkPolicy PersistentVolumeClaim "
         "PodDisruptionBudget Service"),
        (TWO_NODES, "autoscaling", "LeaderWorkerSet NetworkPolicy NetworkPolicy PersistentVolumeClaim "
         "PodDisruptionBudget ScaledObject Service ServiceMonitor"),
    ],
)  # fmt: skip
def test_it_renders_and_every_object_is_valid(settings: ServeSettings, folder: str, kinds: str, tmp_path: Path) -> None:
    found = render(write(tmp_path, settings) / "k8s" / folder)
    assert sorted(each["kind"] for each in found) == kinds.split()
    for each in found:
        validate(each)
        for number, _ in enumerate(places(each)):
            spoilt = copy.deepcopy(each)
            list(places(spoilt))[number]["weather"] = "fine"
            with pytest.raises(jsonschema.ValidationError):
                validate(spoilt)


@needs_kubectl
@pytest.mark.parametrize("settings", [ONE_NODE, TWO_NODES])
def test_an_overlay_outside_names_the_image_and_the_bundle_stays_as_it_is(
    settings: ServeSettings, tmp_path: Path
) -> None:
    bundle = write(tmp_path / "bundle", settings)
    site = Path(shutil.copytree(bundle / "k8s" / "site.example", tmp_path / "site"))
    unfilled = [image for each in render(site) for image in images(each)]
    assert unfilled and all(image.endswith("@sha256:FILL-IN") for image in unfilled)  # no name that can be pulled
    text = (site / "kustomization.yaml").read_text()
    assert VLLM_FLOOR in text
    (site / "kustomization.yaml").write_text(text.replace("sha256:FILL-IN", DIGEST))
    found = render(site)
    pulled = [image for each in found for image in images(each)]
    assert set(pulled) == {f"docker.io/vllm/vllm-openai@{DIGEST}"} and len(pulled) == len(unfilled)
    assert {each["metadata"]["namespace"] for each in found} == {"llm"}


def images(found: dict[str, Any]) -> list[str]:
    return [container["image"] for pod in kubernetes._pods(found) for container in pod["containers"]]


def test_one_replica_over_several_nodes_is_vllms_own_way(tmp_path: Path) -> None:
    bundle = write(tmp_path, TWO_NODES)
    assert not (bundle / "k8s/base/deployment.yaml").exists() and not (bundle / "k8s/kserve").exists()
    template = yaml.safe_load((bundle / "k8s/multi-node/leader-worker-set.yaml").read_text())["spec"]
    template = template["leaderWorkerTemplate"]
    leader, worker = (template[f"{role}Template"]["spec"]["containers"][0] for role in ("leader", "worker"))
    assert template["size"] == 2 and leader["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert leader["args"][-2:] == ["--node-rank", "0"] and "readinessProbe" in leader
    assert (
        worker["args"][-3:] == ["--node-rank", "$(LWS_WORKER_INDEX)", "--headless"] and "readinessProbe" not in worker
    )
    odd = TWO_NODES.model_copy(update={"tensor_parallel_size": 12})
    config = {"num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 1, "hidden_size": 12}
    assert "tensor_parallel_size 12 takes no whole number of nodes of 8 GPUs" in "".join(problems(odd, config, None))


def test_the_time_to_end_covers_what_vllm_is_given(tmp_path: Path) -> None:
    settings = ONE_NODE.model_copy(update={"shutdown_timeout": 120})
    pod = yaml.safe_load((write(tmp_path, settings) / "k8s/base/deployment.yaml").read_text())["spec"]["template"][
        "spec"
    ]
    waits = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= waits + 120 + 10


def test_replicas_are_added_by_metrics_that_vllm_has(tmp_path: Path) -> None:
    spec = yaml.safe_load((write(tmp_path, ONE_NODE) / "k8s/autoscaling/scaled-object.yaml").read_text())["spec"]
    queries = [trigger["metadata"]["query"] for trigger in spec["triggers"]]
    assert len(queries) == 2
    rules = "".join(observability.files(ONE_NODE, RECORD | {"measured": {}, "pin": {}, "speculation": {}}).values())
    for query in queries:
        metric = query.removeprefix("sum(").partition("{")[0]
        assert metric in rules, "the observability files, whose metrics are looked for in a real server, have it too"
    assert spec["scaleTargetRef"]["name"] == "llama-3-3-70b"


def test_a_router_chooses_by_prefix_then_free_cache_and_queue(tmp_path: Path) -> None:
    text = (write(tmp_path, ONE_NODE) / "k8s/kserve/llm-inference-service.yaml").read_text()
    profile = yaml.safe_load(text)["spec"]["router"]["scheduler"]["config"]["inline"]["schedulingProfiles"][0]
    weights = {plugin["pluginRef"]: plugin.get("weight") for plugin in profile["plugins"]}
    assert weights == {
        "prefix-cache-scorer": 3, "kv-cache-utilization-scorer": 2, "queue-scorer": 2, "max-score-picker": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("runAsNonRoot: true", "runAsNonRoot: false", "runs as root"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "may write to its root"),
        ("- ALL", "- CHOWN", "has capabilities"),
        ("automountServiceAccountToken: false", "automountServiceAccountToken: true", "token of its service account"),
        ("type: RuntimeDefault", "type: Unconfined", "without seccomp"),
        ("name: VLLM_FLOOR", "name: FLOOR", "starts any vLLM"),
        ("name: API_KEY_FILE", "name: VLLM_API_KEY", "the key as a value"),
        ("kind: Deployment", "kind: [", "cannot be read"),
    ],
)
def test_what_was_loosened_is_found(before: str, after: str, said: str, tmp_path: Path) -> None:
    bundle = write(tmp_path, ONE_NODE)
    found = kubernetes.checks(bundle)
    assert all(one.passed for one in found), found
    assert "digest is still to be filled in" in found[0].detail
    path = bundle / "k8s/base/deployment.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    assert not kubernetes.checks(bundle)[0].passed and said in kubernetes.checks(bundle)[0].detail


def test_a_key_and_a_missing_folder_are_found(tmp_path: Path) -> None:
    bundle = write(tmp_path, ONE_NODE)
    (bundle / "k8s/base/key.yaml").write_text(
        "apiVersion: v1\nkind: Secret\nmetadata: {name: key}\nstringData: {a: b}\n"
    )
    assert "a Secret stands in it" in kubernetes.checks(bundle)[0].detail
    shutil.rmtree(bundle / "k8s")
    assert "k8s/ is missing" in kubernetes.checks(bundle)[0].detail


@pytest.mark.parametrize(
    ("folder", "line", "said"),
    [
        ("base", "resources: ['https://127.0.0.1/x.git?ref=v1']", "is no file in its folder"),
        ("base", "resources: [../../bundle.json]", "is no file in its folder"),
        ("autoscaling", "bases: ['git::file:///srv/x']", "is no folder beside it"),
        ("autoscaling", "bases: [/srv/x, ../base]", "is no folder beside it"),
        ("base", "helmCharts: [{name: x, repo: 'https://127.0.0.1'}]", "helmCharts is no part of it"),
        ("base", "resources: {a: b}", "is no file in its folder"),
    ],
)
def test_kubectl_is_not_asked_of_what_leads_elsewhere(folder: str, line: str, said: str, tmp_path: Path) -> None:
    bundle = write(tmp_path, ONE_NODE)
    (bundle / "k8s" / folder / "kustomization.yaml").write_text(line)
    (found,) = kubernetes.checks(bundle)
    assert not found.passed and said in found.detail


@pytest.mark.vllm
def test_vllm_takes_the_words_of_leader_and_worker(tmp_path: Path) -> None:
    template = kubernetes._leader_worker_set(TWO_NODES, kubernetes.names_of(TWO_NODES), 1)["spec"][
        "leaderWorkerTemplate"
    ]
    program = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "found = [vars(make_arg_parser(FlexibleArgumentParser()).parse_args(a)) for a in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[a['nnodes'], a['node_rank'], a['master_addr'], a['headless']] for a in found]))\n"
    )
    words = []
    for role in ("leader", "worker"):
        args = template[f"{role}Template"]["spec"]["containers"][0]["args"][2:]  # without --config
        words.append([a.replace("$(LWS_LEADER_ADDRESS)", "leader").replace("$(LWS_WORKER_INDEX)", "1") for a in args])
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, json.dumps(words)], capture_output=True, text=True,
        env=vllm_environment.process_environment(on_cpu=True),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[2, 0, "leader", False], [2, 1, "leader", True]]
