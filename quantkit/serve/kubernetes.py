"""A cluster: kustomize folders for replicas of vLLM, for replicas over several nodes, for KServe with llm-d's router.

`k8s/base` holds kinds that every cluster knows; what needs something installed beside (KEDA and the Prometheus
operator, LeaderWorkerSet, KServe) lies in a folder of its own. All are used from an overlay outside the bundle, which
names the image by digest (`k8s/site.example`): no digest stands here that nobody looked up.
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from quantkit import foreign, vllm_environment
from quantkit.serve import rendering
from quantkit.serve.compose import VLLM_FLOOR
from quantkit.serve.settings import CONFIG_FILES, ServeSettings
from quantkit.serve.verdict import Check, ask_tool, of_problems

FOLDER = "k8s"
# .invalid resolves nowhere (RFC 2606): without an overlay that names the image, nothing is pulled.
IMAGE = "quantkit.invalid/vllm"

_MOUNT = "/bundle"
_KEY_FILE = "/run/secrets/vllm/api-key"
_PRE_STOP_S = 5  # a pod that ends is still sent requests until all nodes have heard of it
_MARGIN_S = 15  # to wind the engine down, after the last request
_START_S = 1800  # loading, compiling and capturing graphs
_USER = 65532
# Replicas are added beyond so many waiting requests, or so full a KV cache, in the mean over replicas.
_WAITING, _KV_USE = 4, 0.7
_PROMETHEUS = "http://prometheus-operated.monitoring.svc:9090"

Object = dict[str, Any]


class Names(NamedTuple):
    """What the objects of one bundle are called."""

    app: str
    claim: str
    secret: str


def nodes(settings: ServeSettings) -> int:
    """How many nodes one replica takes."""
    return max(settings.tensor_parallel_size // settings.gpus_per_node, 1)


def files(settings: ServeSettings, record: Mapping[str, Any]) -> dict[str, str]:
    """Path in the bundle -> text."""
    names = names_of(settings)
    size = sum(found["size"] for found in record["files"].values())
    labels = _labels(names)
    base = {
        "service": _object("v1", "Service", names.app, labels, {
            "selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        }),
        "network-policy": _object("networking.k8s.io/v1", "NetworkPolicy", names.app, labels, _router_only(labels)),
        "disruption-budget": _object("policy/v1", "PodDisruptionBudget", names.app, labels, {
            "maxUnavailable": 1, "selector": {"matchLabels": labels},
        }),
        "volume-claim": _object("v1", "PersistentVolumeClaim", names.claim, labels, {
            "accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": f"{_gibibytes(size) + 1}Gi"}},
        }),
    }  # fmt: skip
    several = nodes(settings) > 1
    if not several:
        base["deployment"] = _deployment(settings, names, size)
    target = ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet") if several else ("apps/v1", "Deployment")
    scaling = _scaling(settings, names, target)
    autoscaling = {
        "scaled-object": _object("keda.sh/v1alpha1", "ScaledObject", names.app, labels, scaling),
        "service-monitor": _object("monitoring.coreos.com/v1", "ServiceMonitor", names.app, labels, {
            "selector": {"matchLabels": labels}, "endpoints": [{"port": "http", "path": "/metrics", "interval": "5s"}],
        }),
    }  # fmt: skip
    folders = _folder("base", base)
    if several:
        group = {
            "leader-worker-set": _leader_worker_set(settings, names, size),
            "group-policy": _object(
                "networking.k8s.io/v1", "NetworkPolicy", f"{names.app}-group", labels, _within_the_group(names)
            ),
        }
        folders |= _folder("multi-node", group, "../base")
    else:
        folders |= _folder("kserve", {"llm-inference-service": _inference_service(settings, names, size)})
    folders |= _folder("autoscaling", autoscaling, "../multi-node" if several else "../base")
    values = {"settings": settings, "names": names, "image": IMAGE, "folder": "multi-node" if several else "base",
              "vllm_version": record["engine"].split()[1], "floor": VLLM_FLOOR}  # fmt: skip
    site = rendering.render("k8s/site.yaml.j2", **values)
    return folders | {f"{FOLDER}/site.example/kustomization.yaml": site}


def checks(bundle: Path) -> list[Check]:
    """Each pod is held tight and reads its key from a Secret that is not here; and what kustomize says."""
    every = sorted(path.parent for path in (bundle / FOLDER).glob("*/kustomization.yaml"))
    problems, folders = [], [folder for folder in every if folder.name != "site.example"]
    if not folders:
        problems.append(f"{FOLDER}/ is missing: build the bundle again")
    try:
        for path in sorted((bundle / FOLDER).rglob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            where = path.relative_to(bundle).as_posix()
            problems += [f"{where}: {line}" for found in yaml.safe_load_all(text) for line in _problems(found)]
        strangers = [line for folder in folders for line in _led_out(folder, folders)]
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        strangers = [f"{FOLDER} cannot be read ({type(error).__name__}: {error}): build the bundle again"]
    if strangers:  # kubectl is not asked of what would have it fetch something, or read elsewhere
        return [of_problems(FOLDER, problems + strangers)]
    good = "hardened, key from a Secret; the image's digest is still to be filled in, in a copy of k8s/site.example"
    asked = [
        ask_tool(
            f"{folder.relative_to(bundle)} renders", ("kubectl", "kustomize", folder), cwd=bundle,
            install="Debian package kubernetes-client",
        )
        for folder in folders
    ]  # fmt: skip
    return [of_problems(FOLDER, problems, good=good), *asked]


def _led_out(folder: Path, folders: Sequence[Path]) -> list[str]:
    """What a kustomization names that is neither a file of its folder nor one of the folders beside it.

    kustomize fetches what looks like a URL, by git too.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    bases = [f"../{base.name}" for base in folders]
    known = {"apiVersion", "kind", "bases", "resources"}
    found = [f"{word} is no part of it" for word in sorted(kustomization.keys() - known, key=str)]
    found += [f"base {base!r} is no folder beside it" for base in kustomization.get("bases", []) if base not in bases]
    found += [
        f"resource {file!r} is no file in its folder"
        for file in kustomization.get("resources", [])
        if not (isinstance(file, str) and foreign.is_name(file) and (folder / file).is_file())
    ]
    return [f"{FOLDER}/{folder.name}/kustomization.yaml: {line}" for line in found]


def names_of(settings: ServeSettings) -> Names:
    """Names that a Service may have: lower case, digits and dashes, a letter first."""
    slug = re.sub(r"[^a-z0-9]+", "-", settings.served_model_name.lower()).strip("-")[:40].strip("-")
    app = slug if slug[:1].isalpha() else f"llm-{slug}".strip("-")
    return Names(app, f"{app}-bundle", f"{app}-api-key")


def _labels(names: Names, component: str = "engine") -> dict[str, str]:
    return {"app.kubernetes.io/name": names.app, "app.kubernetes.io/component": component}


def _object(version: str, kind: str, name: str, labels: Mapping[str, str], spec: Object) -> Object:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": dict(labels)}, "spec": spec}


def _folder(name: str, objects: Mapping[str, Object], base: str | None = None) -> dict[str, str]:
    """A kustomize folder. `bases` and not `resources` for another folder: kubectl before 1.21 knows no other word."""
    listed = {"bases": [base]} if base else {}
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **listed,
                     "resources": [f"{file}.yaml" for file in objects]}  # fmt: skip
    return {f"{FOLDER}/{name}/{file}.yaml": _yaml(found) for file, found in objects.items()} | {
        f"{FOLDER}/{name}/kustomization.yaml": _yaml(kustomization)
    }


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _yaml(value: object) -> str:
    return yaml.dump(value, Dumper=_NoAliases, sort_keys=False, width=120)


def _deployment(settings: ServeSettings, names: Names, size: int) -> Object:
    labels = _labels(names)
    return _object("apps/v1", "Deployment", names.app, labels, {
        "replicas": settings.replicas,
        "selector": {"matchLabels": labels},
        # One after another: while it loads, a new pod needs GPUs of its own, which are seldom there twice.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "progressDeadlineSeconds": _START_S + 600,
        "template": {"metadata": {"labels": labels}, "spec": _pod(settings, names, _engine(settings, names, size))},
    })  # fmt: skip


def _leader_worker_set(settings: ServeSettings, names: Names, size: int) -> Object:
    """Groups of pods, a pod a node, whose first answers; the others find it by the name that the controller gives."""
    group = ["--nnodes", str(nodes(settings)), "--master-addr", "$(LWS_LEADER_ADDRESS)"]
    leader = _engine(settings, names, size, [*group, "--node-rank", "0"])
    worker = _engine(settings, names, size, [*group, "--node-rank", "$(LWS_WORKER_INDEX)", "--headless"])
    for only_of_a_server in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
        del worker[only_of_a_server]
    return _object("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", names.app, _labels(names), {
        "replicas": settings.replicas,
        "leaderWorkerTemplate": {
            "size": nodes(settings),
            "restartPolicy": "RecreateGroupOnPodRestart",  # ranks do not join a group again
            "leaderTemplate": {"metadata": {"labels": _labels(names)}, "spec": _pod(settings, names, leader)},
            "workerTemplate": {
                "metadata": {"labels": _labels(names, "engine-worker")}, "spec": _pod(settings, names, worker),
            },
        },
    })  # fmt: skip


def _pod(settings: ServeSettings, names: Names, container: Object) -> Object:
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # a Service named vllm would set VLLM_PORT, which vLLM reads
        "securityContext": _pod_security(),
        "terminationGracePeriodSeconds": _PRE_STOP_S + settings.shutdown_timeout + _MARGIN_S,
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
             "labelSelector": {"matchLabels": _labels(names)}}
        ],
        "containers": [container],
        "volumes": [
            {"name": "bundle", "persistentVolumeClaim": {"claimName": names.claim, "readOnly": True}},
            _key_volume(names),
            {"name": "tmp", "emptyDir": {}},
            {"name": "cache", "emptyDir": {}},  # compiled kernels and pickles: of this pod alone
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }  # fmt: skip


def _engine(settings: ServeSettings, names: Names, size: int, more: list[str] | None = None) -> Object:
    """vLLM's container. /health answers when the engine can take requests, and no more when it has died."""
    probe = {"httpGet": {"path": "/health", "port": "http"}}
    return {
        "name": "vllm",
        "image": IMAGE,
        # It refuses a vLLM below the floor, and reads the key from a file.
        "command": ["python3", "-P", f"{_MOUNT}/compose/start_vllm.py"],
        "args": ["--config", CONFIG_FILES["gpu"], "--host", "0.0.0.0", "--port", str(settings.port), *(more or [])],
        "workingDir": _MOUNT,  # paths in the settings are relative to the bundle
        "env": [{"name": name, "value": value} for name, value in _environment("/cache").items()],
        "ports": [{"name": "http", "containerPort": settings.port}],
        "startupProbe": probe | {"periodSeconds": 10, "failureThreshold": _START_S // 10},
        "readinessProbe": probe | {"periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 2},
        "livenessProbe": probe | {"periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_PRE_STOP_S)]}}},
        "resources": _resources(settings, size),
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "bundle", "mountPath": _MOUNT, "readOnly": True},
            {"name": "api-key", "mountPath": str(Path(_KEY_FILE).parent), "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "cache", "mountPath": "/cache"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _environment(home: str) -> dict[str, str]:
    return vllm_environment.settings(on_cpu=False) | {
        "API_KEY_FILE": _KEY_FILE,
        "VLLM_FLOOR": VLLM_FLOOR,
        "VLLM_MAX_N_SEQUENCES": "64",  # answers to one request; 16384 if not said
        "HOME": home,
        "USER": "vllm",  # the compiler asks who runs it, and this uid has no name in the image
    }


def _key_volume(names: Names) -> Object:
    items = [{"key": "api-key", "path": Path(_KEY_FILE).name}]
    return {"name": "api-key", "secret": {"secretName": names.secret, "items": items}}


def _resources(settings: ServeSettings, size: int) -> Object:
    """GPUs of one node; memory for the weights, which pass through it, and for the server."""
    gpus = {"nvidia.com/gpu": str(min(settings.tensor_parallel_size, settings.gpus_per_node))}
    return {"limits": gpus, "requests": {"cpu": "4", "memory": f"{_gibibytes(size) + 8}Gi"}}


def _pod_security() -> Object:
    return {"runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "seccompProfile": {"type": "RuntimeDefault"}}


def _container_security() -> Object:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _router_only(labels: Mapping[str, str]) -> Object:
    """Requests from pods that are a router, /metrics for Prometheus, names from DNS, and nothing else."""
    dns = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
           "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}  # fmt: skip
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
                  "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}  # fmt: skip
    router = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "router"}}}
    return {
        "podSelector": {"matchLabels": dict(labels)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [router, prometheus], "ports": [{"protocol": "TCP", "port": "http"}]}],
        "egress": [{"to": [dns], "ports": [{"protocol": each, "port": 53} for each in ("UDP", "TCP")]}],
    }


def _within_the_group(names: Names) -> Object:
    """All ports between the nodes of a replica: they choose them as they go, and none asks who is there."""
    parts = {"key": "app.kubernetes.io/component", "operator": "In", "values": ["engine", "engine-worker"]}
    group = {"matchLabels": {"app.kubernetes.io/name": names.app}, "matchExpressions": [parts]}
    dns = _router_only(_labels(names))["egress"]
    return {
        "podSelector": group,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": group}]}],
        "egress": [{"to": [{"podSelector": group}]}, *dns],
    }


def _scaling(settings: ServeSettings, names: Names, target: tuple[str, str]) -> Object:
    """Replicas by waiting requests and KV use.

    By KEDA and not by a HorizontalPodAutoscaler of its own: the queries stand in the object that scales, and need no
    adapter that is set up for the whole cluster.
    """

    def trigger(metric: str, threshold: float) -> Object:
        query = f'sum({metric}{{service="{names.app}"}})'
        values = {"serverAddress": _PROMETHEUS, "query": query, "threshold": str(threshold)}
        return {"type": "prometheus", "metricType": "AverageValue", "metadata": values}

    return {
        "scaleTargetRef": {"apiVersion": target[0], "kind": target[1], "name": names.app},
        "minReplicaCount": settings.replicas,
        "maxReplicaCount": 4 * settings.replicas,
        "fallback": {"failureThreshold": 5, "replicas": settings.replicas},  # where Prometheus does not answer
        "advanced": {
            "horizontalPodAutoscalerConfig": {
                "behavior": {
                    "scaleUp": {"stabilizationWindowSeconds": 30},
                    "scaleDown": {  # a replica takes minutes to come back
                        "stabilizationWindowSeconds": 600,
                        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}],
                    },
                }
            }
        },
        "triggers": [trigger("vllm:num_requests_waiting", _WAITING), trigger("vllm:kv_cache_usage_perc", _KV_USE)],
    }


def _inference_service(settings: ServeSettings, names: Names, size: int) -> Object:
    """vLLM behind a gateway and llm-d's picker, all started by KServe; known prefix, free KV cache, short queue win.

    The claim is mounted where KServe wants models, and TLS between the pods is KServe's own.
    """
    name = settings.served_model_name
    command = " ".join([
        "cd /mnt/models && exec python3 -P compose/start_vllm.py --config", CONFIG_FILES["gpu"],
        "--host 0.0.0.0 --port 8000 --served-model-name", shlex.quote(name),
        shlex.quote("publishers/{{ .ObjectMeta.Namespace }}/models/" + name),
        "{{ if .GlobalConfig.EnableTLS }}--enable-ssl-refresh --ssl-certfile /var/run/kserve/tls/tls.crt "
        "--ssl-keyfile /var/run/kserve/tls/tls.key{{ end }}",
    ])  # fmt: skip
    weights = {"prefix-cache-scorer": 3, "kv-cache-utilization-scorer": 2, "queue-scorer": 2}
    picked = [{"pluginRef": scorer, "weight": weight} for scorer, weight in weights.items()]
    picker = {
        "apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig",
        "plugins": [{"type": kind} for kind in ("single-profile-handler", *weights, "max-score-picker")],
        "schedulingProfiles": [{"name": "default", "plugins": [*picked, {"pluginRef": "max-score-picker"}]}],
    }  # fmt: skip
    container = {
        "name": "main",
        "image": IMAGE,
        "command": ["/bin/bash", "-c", command],
        "env": [{"name": name, "value": value} for name, value in _environment("/home").items()],
        "startupProbe": {"failureThreshold": _START_S // 10},
        "resources": _resources(settings, size),
        "securityContext": _container_security(),
        "volumeMounts": [{"name": "api-key", "mountPath": str(Path(_KEY_FILE).parent), "readOnly": True}],
    }
    return _object("serving.kserve.io/v1alpha2", "LLMInferenceService", names.app, _labels(names), {
        "model": {"uri": f"pvc://{names.claim}", "name": name},
        "replicas": settings.replicas,
        "router": {"gateway": {}, "route": {}, "scheduler": {"config": {"inline": picker}}},
        "template": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": _pod_security(),
            "terminationGracePeriodSeconds": 15 + settings.shutdown_timeout + _MARGIN_S,  # 15: KServe's own preStop
            "containers": [container],
            "volumes": [_key_volume(names)],
        },
    })  # fmt: skip


def _problems(found: object) -> Iterator[str]:
    """What is wrong with one object: a value of a Secret, or a pod that is not held tight."""
    if not isinstance(found, dict):
        return
    if found.get("kind") == "Secret":
        yield "a Secret stands in it: keys come from outside the bundle"
    for pod in _pods(found):
        user = pod.get("securityContext", {})
        if (
            not (user.get("runAsNonRoot") and user.get("runAsUser"))
            or pod.get("automountServiceAccountToken") is not False
        ):
            yield "a pod runs as root, or with a token of its service account"
        if user.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield "a pod without seccomp"
        for container in pod["containers"]:
            if container.get("securityContext") != _container_security():
                yield f"container {container['name']} may write to its root, gain rights or has capabilities"
            values = {each["name"]: each.get("value") for each in container.get("env", [])}
            if values.get("VLLM_FLOOR") != VLLM_FLOOR or "VLLM_API_KEY" in values:
                yield f"container {container['name']} starts any vLLM, or has the key as a value"


def _pods(found: object) -> Iterator[Object]:
    """Every pod's specification in an object, wherever it stands."""
    if isinstance(found, dict):
        if "containers" in found:
            yield found
        for value in found.values():
            yield from _pods(value)
    elif isinstance(found, list):
        for value in found:
            yield from _pods(value)


def _gibibytes(size: int) -> int:
    return math.ceil(size / 2**30)
