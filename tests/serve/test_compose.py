"""compose.yaml and what it mounts: what is in it for which settings, and what a check makes of a spoiled one."""

import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from quantkit.serve import compose, observability, verdict
from quantkit.serve.settings import ServeSettings

SETTINGS = ServeSettings(served_model_name="Tiny 1.5", max_model_len=1024, max_num_seqs=8, num_speculative_tokens=3)
RECORD: dict[str, Any] = {"engine": "vllm 0.32.0", "measured": {}, "speculation": {"plans": {}}}


def write(folder: Path, **changes: Any) -> Path:
    """The files of compose and of observability, for settings with these changes."""
    settings = SETTINGS.model_copy(update=changes)
    for name, text in (compose.files(settings, RECORD) | observability.files(settings, RECORD)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def problems(folder: Path) -> dict[str, str]:
    return {one.name: one.detail for one in compose.checks(folder) if not one.passed}


@pytest.mark.parametrize(
    "changes", [{}, {"replicas": 1}, {"replicas": 3, "tensor_parallel_size": 2, "router": "cache_aware"}]
)
def test_what_is_written_passes_every_check(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert problems(write(tmp_path, **changes)) == {}


def test_replicas_have_gpus_of_their_own_and_the_router_knows_them_all(tmp_path: Path) -> None:
    written = yaml.safe_load((write(tmp_path, replicas=3, tensor_parallel_size=2) / "compose.yaml").read_text())
    services = written["services"]
    gpus = [
        services[f"vllm-{n}"]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for n in range(3)
    ]  # fmt: skip
    assert gpus == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert services["router"]["command"][-3:] == [f"http://vllm-{n}:8000" for n in range(3)]
    assert written["name"] == "tiny-1-5"
    scraped = yaml.safe_load((tmp_path / "observability" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert [one["targets"] for one in scraped["static_configs"]] == [[f"vllm-{n}:8000"] for n in range(3)]
    assert "burst=24" in (tmp_path / "compose" / "nginx.conf").read_text()


def test_no_digest_is_invented_and_no_image_goes_without(tmp_path: Path) -> None:
    text = (write(tmp_path) / "compose.yaml").read_text()
    assert "sha256:" not in text
    assert len(re.findall(r"image: \$\{\w+:-[\w./-]+\}@\$\{\w+_DIGEST:\?is not set", text)) == 5
    example = (tmp_path / "compose" / "deploy.env.example").read_text()
    for name in re.findall(r"\$\{(\w+):\?", text):
        assert re.search(rf"^{name}=$", example, re.MULTILINE), f"{name} is required, and the example does not say so"


@pytest.mark.parametrize("router", ["least_load", "cache_aware"])
def test_smg_takes_the_flags(tmp_path: Path, router: str) -> None:
    launch_router = pytest.importorskip("smg.launch_router", reason="smg is not installed: quantkit[compose]")
    services = yaml.safe_load((write(tmp_path, router=router) / "compose.yaml").read_text())["services"]
    flags = launch_router.parse_router_args(services["router"]["command"])
    assert (flags.policy, flags.backend) == (router, "vllm")
    assert flags.worker_urls == ["http://vllm-0:8000", "http://vllm-1:8000"]
    assert flags.balance_token_usage_threshold == (0.2 if router == "cache_aware" else 1.0)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("127.0.0.1:${BUNDLE_PORT", "0.0.0.0:${BUNDLE_PORT", "proxy: port 0.0.0.0:"),
        ("@${SMG_DIGEST:?is not set, see compose/deploy.env.example}", ":latest", "router: image"),
        ("read_only: true\n  cap_drop", "read_only: false\n  cap_drop", "read_only is False"),
        ("cap_drop: [ALL]", "cap_drop: [NET_RAW]", "vllm-0: cap_drop"),
        ('user: "${BUNDLE_UID:-65532}', 'user: "${BUNDLE_UID:-0}', "vllm-1: runs as root"),
        ('user: "65534:65534"', "user: root", "prometheus: runs as root"),
        ("networks: [edge, outside]", "networks: [edge]\n    privileged: true", "proxy: privileged"),
        ("networks: [engines, edge]", 'networks: [engines]\n    ports: ["127.0.0.1:1:1"]', "router: publishes"),
        ('VLLM_FLOOR: "0.22.1"', 'VLLM_FLOOR: "0.9.0"', "VLLM_FLOOR is not 0.22.1"),
        ("HOME: /tmp\n    USER", "VLLM_API_KEY: secret\n    USER", "a key stands in it"),
        ("GF_USERS_ALLOW_SIGN_UP", "K: 0123456789abcdef0123456789abcdef\n      GF_USERS_ALLOW", "a key stands in it"),
        ("./compose/nginx.conf", "./compose/other.conf", "other.conf is missing"),
        ("services:", "service:", "cannot be read"),
    ],
)  # fmt: skip
def test_a_loosened_file_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = write(tmp_path) / "compose.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert words in problems(tmp_path)["compose.yaml"]


def test_an_image_by_digest_needs_no_variable(tmp_path: Path) -> None:
    path = write(tmp_path) / "compose.yaml"
    path.write_text(re.sub(r"@\$\{\w+_DIGEST:\?[^}]+\}", "@sha256:" + "0123456789abcdef" * 4, path.read_text()))
    assert problems(tmp_path) == {}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("location = /health", "location /health", "location /health must not be open"),
        ("return 404;", "proxy_pass http://router;", "other paths must get 404"),
        ("location = /v1/models", "location ~ /v1/.*", "location ~ /v1/.* must not be open"),
        ("events {", "load_module /tmp/module.so;\nevents {", "load_module has no place in it"),
    ],
)
def test_a_proxy_that_lets_more_through_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = write(tmp_path) / "compose" / "nginx.conf"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert words in problems(tmp_path)["compose/nginx.conf"]


@pytest.mark.skipif(verdict.find_tool("check-jsonschema") is None, reason="not installed: quantkit[compose]")
def test_a_key_that_compose_does_not_know_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / "compose.yaml"
    path.write_text(path.read_text().replace("stop_grace_period", "stop_grace_time"))
    assert "stop_grace_time" in problems(tmp_path)["compose.yaml is a compose file"]


@pytest.mark.skipif(verdict.find_tool("nginx") is None, reason="not installed: Debian package nginx")
def test_a_word_that_nginx_does_not_know_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / "compose" / "nginx.conf"
    path.write_text(path.read_text().replace("proxy_buffering off", "proxy_buffer off"))
    assert 'unknown directive "proxy_buffer"' in problems(tmp_path)["compose/nginx.conf"]


class _Stream(http.server.BaseHTTPRequestHandler):
    """Ten events, a moment apart, without chunked encoding: that nginx would hand on as it comes, buffered or not."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for _ in range(10):
            self.wfile.write(b"data: {}\n\n")
            time.sleep(0.1)


@pytest.mark.skipif(verdict.find_tool("nginx") is None, reason="not installed: Debian package nginx")
def test_the_proxy_holds_no_event_back(tmp_path: Path) -> None:
    nginx, conf = verdict.find_tool("nginx"), write(tmp_path) / "compose" / "nginx.conf"
    assert nginx is not None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stream) as server, socket.socket() as free:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        places = {"router:30000": f"127.0.0.1:{server.server_port}", "listen 8080": f"listen 127.0.0.1:{port}"}
        for old, new in (places | {"/tmp/": f"{tmp_path}/"}).items():
            conf.write_text(conf.read_text().replace(old, new))
        user = ["-g", "user root;"] if os.geteuid() == 0 else []
        process = subprocess.Popen([nginx, "-e", "/dev/stderr", "-c", str(conf), *user])
        try:
            pieces = _pieces(f"http://127.0.0.1:{port}/v1/chat/completions")
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
    assert b"".join(pieces) == b"data: {}\n\n" * 10 and len(pieces) > 3


def _pieces(url: str) -> list[bytes]:
    transport = httpx.HTTPTransport(retries=8)  # until nginx listens
    with httpx.Client(transport=transport, timeout=60) as client, client.stream("POST", url, json={}) as response:
        return list(response.iter_raw())


def test_what_could_not_be_asked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "find_tool", lambda name: None)
    found = {one.name: one for one in compose.checks(write(tmp_path))}
    assert found["compose/nginx.conf"].passed
    assert found["compose/nginx.conf"].detail == "not asked: nginx is not here (Debian package nginx)"


@pytest.mark.parametrize(
    ("version", "key", "words"),
    [
        ("0.22.0", "secret", "vLLM 0.22.0 is below 0.22.1"),
        ("0.9.2", "secret", "vLLM 0.9.2 is below 0.22.1"),
        ("0.32.0+cpu", None, "the API key cannot be read from"),
        ("0.32.0", " \n", "is empty: vLLM would answer everybody"),
    ],
)  # fmt: skip
def test_vllm_is_not_started_old_or_without_a_key(tmp_path: Path, version: str, key: str | None, words: str) -> None:
    metadata = tmp_path / "site" / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    if key is not None:
        (tmp_path / "key").write_text(key)
    program = write(tmp_path / "bundle") / "compose" / "start_vllm.py"
    environment = {
        "PYTHONPATH": str(tmp_path / "site"), "VLLM_FLOOR": compose.VLLM_FLOOR, "API_KEY_FILE": str(tmp_path / "key")
    }  # fmt: skip
    run = subprocess.run([sys.executable, "-P", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and words in run.stderr
