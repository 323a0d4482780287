"""One machine: replicas, a router that sees their KV caches, a proxy, Prometheus and Grafana, as a compose file."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from quantkit import vllm_environment
from quantkit.serve import rendering
from quantkit.serve.settings import CONFIG_FILES, ServeSettings
from quantkit.serve.verdict import Check, ask_tool, of_problems

FILE = "compose.yaml"
FOLDER = "compose"
OPEN_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models")  # and /health, which asks the router
# CVE-2026-48746, an API key that could be passed by, was closed in 0.22.0, CVE-2026-54232, foreign packages in images,
# in 0.22.1.
VLLM_FLOOR = "0.22.1"
SMG_VERSION = "1.13.0"

_NGINX = f"{FOLDER}/nginx.conf"
# A value that looks like a key has no place in any of these files.
_KEY = re.compile(r"(?<!sha256:)\b(sk-[\w-]{16,}|[0-9a-f]{32,64})\b")


def files(settings: ServeSettings, record: Mapping[str, Any]) -> dict[str, str]:
    """Path in the bundle -> text."""
    ranks, slots = settings.tensor_parallel_size, settings.replicas * settings.max_num_seqs
    environment = vllm_environment.settings(on_cpu=False)
    values = {
        "settings": settings, "replicas": settings.replicas, "config": CONFIG_FILES["gpu"], "paths": OPEN_PATHS,
        "gpus": [[str(rank) for rank in range(i * ranks, (i + 1) * ranks)] for i in range(settings.replicas)],
        "project": re.sub(r"[^a-z0-9_-]+", "-", settings.served_model_name.lower()).strip("-_") or "bundle",
        "vllm_environment": environment, "vllm_floor": VLLM_FLOOR, "vllm_version": record["engine"].split()[1],
        "smg_version": SMG_VERSION, "slots": slots,
    }  # fmt: skip
    templates = {
        FILE: "compose.yaml.j2", f"{FOLDER}/deploy.env.example": "deploy.env.example",
        f"{FOLDER}/nginx.conf": "nginx.conf.j2", f"{FOLDER}/start_vllm.py": "start_vllm.py",
        f"{FOLDER}/start_router.py": "start_router.py",
        f"{FOLDER}/grafana/datasources/prometheus.yaml": "grafana_datasource.yaml",
        f"{FOLDER}/grafana/dashboards/bundle.yaml": "grafana_dashboards.yaml",
    }  # fmt: skip
    return {path: rendering.render(f"compose/{name}", **values) for path, name in templates.items()}


def checks(bundle: Path) -> list[Check]:
    """Each service is held tight, only the proxy and Grafana are open, to this machine alone; and what tools say."""
    try:
        text = (bundle / FILE).read_text(encoding="utf-8")
        services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
        problems = _problems(bundle, text, services)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        problems = [f"{FILE} cannot be read ({type(error).__name__}: {error}): build the bundle again"]
    return [
        of_problems(FILE, problems, good="hardened, images by digest, keys from files outside, open to 127.0.0.1 only"),
        ask_tool(
            f"{FILE} is a compose file", ("check-jsonschema", "--builtin-schema", "vendor.compose-spec", FILE),
            cwd=bundle, install="quantkit[compose]",
        ),
        _ask_nginx(bundle),
    ]  # fmt: skip


def _problems(bundle: Path, text: str, services: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = [f"{path} is missing" for path in _mounted(services) if not (bundle / path).exists()]
    for name, service in services.items():
        image = str(service.get("image"))
        if not re.search(r"@(sha256:[0-9a-f]{64}|\$\{\w+:\?[^}]+\})$", image):
            found.append(f"{name}: image {image} is not named by digest")
        if re.match(r"\$\{\w+:-0\}|0\b|root\b", str(service.get("user", "root"))):
            found.append(f"{name}: runs as root: give it a user")
        for key, value in _HARDENED.items():
            if service.get(key) != value:
                found.append(f"{name}: {key} is {service.get(key)!r}, not {value!r}")
        found += [f"{name}: {key} is no part of it" for key in _LOOSENING if service.get(key)]
        if service.get("ports") and name not in ("proxy", "grafana"):
            found.append(f"{name}: publishes {service['ports']}: only the proxy and Grafana may")
        found += [
            f"{name}: port {port} is open to other machines: begin it with 127.0.0.1:"
            for port in service.get("ports", [])
            if not str(port).startswith("127.0.0.1:")
        ]
        if name.startswith("vllm-") and service.get("environment", {}).get("VLLM_FLOOR") != VLLM_FLOOR:
            found.append(f"{name}: VLLM_FLOOR is not {VLLM_FLOOR}, below which known holes are open")
    if _KEY.search(text) or "VLLM_API_KEY" in text:
        found.append("a key stands in it: keys come from files outside the bundle")
    return found


_LOOSENING = ("privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "userns_mode")
_HARDENED = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}


def _mounted(services: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Files and folders of the bundle that services mount."""
    volumes = [volume for service in services.values() for volume in service.get("volumes", [])]
    return sorted({str(volume["source"]) for volume in volumes if volume["type"] == "bind"})


def _ask_nginx(bundle: Path) -> Check:
    """Whether the proxy lets through what it should and no more, and what nginx says of its file."""
    try:
        text = (bundle / FOLDER / "nginx.conf").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Check(name=_NGINX, passed=False, detail=f"{FOLDER}/nginx.conf cannot be read: {error}")
    known = {*(f"= {path}" for path in (*OPEN_PATHS, "/key", "/health")), "/"}
    found = re.findall(r"\blocation\s+([^{]*?)\s*\{", text)
    problems = [f"location {one} must not be open" for one in found if one not in known]
    # nginx is not asked of a file that would have it run other code.
    problems += [f"{word} has no place in it" for word in ("load_module", "include") if re.search(rf"\b{word}\b", text)]
    if not re.search(r"location / \{\s*return 404;\s*\}", text):
        problems.append("other paths must get 404")
    if problems:
        return of_problems(_NGINX, problems)
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch) / "nginx.conf"
        # It looks up the upstream's name, which exists inside the compose network only.
        here.write_text(text.replace("router:30000", "127.0.0.1:30000").replace("/tmp/", f"{scratch}/"))
        return ask_tool(_NGINX, ("nginx", "-t", "-q", "-c", here), cwd=Path(scratch), install="Debian package nginx")
