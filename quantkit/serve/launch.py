"""Starts the real vLLM server on a bundle, waits until it answers, and leaves nothing behind."""

import ctypes.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

import httpx

from quantkit import processes, vllm_environment
from quantkit.errors import QuantkitError
from quantkit.serve import bundle as bundles
from quantkit.serve import kv_scales, processor
from quantkit.speculation import Profile
from quantkit.vllm_plugin import SCALES_VARIABLE

Progress = Callable[[float, str], None]


class Server(NamedTuple):
    """A running vLLM: where it answers, its process (leader of its own group), its profile and its log.

    substitutes: what this processor cannot do of the profile, and what is done instead.
    told: the folder where its processes wrote which KV scales they loaded (`kv_scales`).
    """

    base_url: str
    pid: int
    profile: Profile
    log: Path
    told: Path
    substitutes: tuple[str, ...] = ()


def resolve_profile(profile: Literal["auto", "gpu", "cpu"]) -> Profile:
    """The profile for this machine: `gpu` where a CUDA driver and a CUDA build of vLLM are both there.

    Raises:
        QuantkitError: vLLM is not installed, or the profile asks for what this build cannot do.
    """
    found = vllm_environment.distribution()
    if found is None:
        raise QuantkitError(f"vLLM is not installed: {vllm_environment.INSTALL_HINT}")
    cpu_build = vllm_environment.is_cpu_build()
    if profile == "auto":
        return "cpu" if cpu_build or ctypes.util.find_library("cuda") is None else "gpu"
    if profile == "gpu" and cpu_build:
        raise QuantkitError(f"profile gpu needs the CUDA build of vLLM, here is {found[0]} {found[1]}: use profile cpu")
    if profile == "cpu" and not cpu_build:
        raise QuantkitError(f"profile cpu needs the CPU build of vLLM, here is {found[0]} {found[1]}: use profile gpu")
    return profile


class Settings(NamedTuple):
    """A vLLM settings file, the folder that its relative paths are of, and what is added to the command line."""

    file: Path
    folder: Path
    profile: Profile
    substitutes: tuple[processor.Substitute, ...] = ()


def settings_of(bundle: Path, profile: Literal["auto", "gpu", "cpu"]) -> Settings:
    """A bundle's own settings for this machine.

    Raises:
        QuantkitError: the folder is no bundle, or vLLM here cannot do the profile.
    """
    chosen = resolve_profile(profile)
    path = bundles.config_path(bundle, chosen)
    return Settings(path, bundle, chosen, tuple(processor.substitutes(bundle)) if chosen == "cpu" else ())


@contextmanager
def serving(
    bundle: Path, *, profile: Literal["auto", "gpu", "cpu"] = "auto", port: int | None = None, log: Path,
    start_timeout_s: float = 900, stop_timeout_s: float = 30, drain_timeout_s: int = 0,
    on_wait: Progress | None = None,
) -> Iterator[Server]:  # fmt: skip
    """Run the bundle's server for the length of the block, on 127.0.0.1; what it loaded of KV scales is written down.

    Args:
        port: the port to use; a free one by default.
        log: file for all that the server prints; replaced.
        start_timeout_s: how long it may take to answer /health.
        stop_timeout_s: how long it may take to end by itself before it is killed with all its children.
        drain_timeout_s: how long, before that, requests under way may go on; this one wins over the bundle's
            shutdown-timeout, as vLLM's CPU workers often stay until it is over even when there is nothing to drain.
        on_wait: called about twice a second while it starts, with the seconds so far and the log's last line.

    Raises:
        QuantkitError: it cannot start (the last telling line of its log is in the message), or the port is taken.
    """
    settings = settings_of(bundle, profile)
    for attempt in (1, 2, 3):
        with started(
            settings, port=port, log=log, stop_timeout_s=stop_timeout_s, drain_timeout_s=drain_timeout_s
        ) as starting:
            if starting.wait(start_timeout_s, on_wait, retry=port is None and attempt < 3):
                yield starting.server
                return


class Starting(NamedTuple):
    """A server that was started; whether it answers yet is to be waited for."""

    server: Server
    process: "subprocess.Popen[bytes]"

    def wait(self, timeout_s: float = 900, on_wait: Progress | None = None, *, retry: bool = False) -> bool:
        """Wait until it answers /health; False where another process took its port first and `retry` allows it.

        Raises:
            QuantkitError: it ended, or does not answer in time.
        """
        return _wait_until_healthy(self.server, self.process, timeout_s, on_wait, retry=retry)


@contextmanager
def started(
    settings: Settings, *, port: int | None = None, log: Path, stop_timeout_s: float = 30, drain_timeout_s: int = 0
) -> Iterator[Starting]:
    """A server that begins to start and is ended with the block, so that several can start side by side.

    Raises:
        QuantkitError: the port is taken.
    """
    number = port if port is not None else _free_port()
    if not _port_is_free(number):
        raise QuantkitError(f"port {number} on 127.0.0.1 is taken: give another --port, or none to have one chosen")
    overrides = ["--host", "127.0.0.1", "--port", str(number), "--shutdown-timeout", str(drain_timeout_s)]
    overrides += [flag for one in settings.substitutes for flag in one.flags]
    with kv_scales.told() as told:
        process = _start(settings, log, overrides, told)
        said = tuple(one.said for one in settings.substitutes)
        server = Server(f"http://127.0.0.1:{number}", process.pid, settings.profile, log, told, said)
        with _ended_on_exit(process, drain_timeout_s + stop_timeout_s):
            yield Starting(server, process)


def foreground(
    bundle: Path, *, profile: Literal["auto", "gpu", "cpu"] = "auto", port: int | None = None, log: Path,
    on_wait: Progress | None = None, on_ready: Callable[[Server], None] | None = None,
) -> None:  # fmt: skip
    """Run the bundle's server until Ctrl-C, SIGTERM or its own end; the port is the bundle's own unless given.

    Raises:
        QuantkitError: it cannot start, or it ended by itself.
    """
    own = bundles.read_bundle(bundle)["settings"]
    number, drain_timeout_s = port or int(own["port"]), int(own["shutdown_timeout"])
    try:
        with serving(
            bundle, profile=profile, port=number, log=log, drain_timeout_s=drain_timeout_s, on_wait=on_wait
        ) as server:
            if on_ready:
                on_ready(server)
            while _group_leader_lives(server.pid):
                time.sleep(0.5)
            raise QuantkitError(f"vLLM ended by itself: {processes.telling_line(log)} (whole log: {log})")
    except KeyboardInterrupt:
        return


def _start(settings: Settings, log: Path, extra: list[str], told: Path) -> "subprocess.Popen[bytes]":
    """Start vLLM in a session of its own: its whole family can be ended, and Ctrl-C does not reach it first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # The very entry point behind `vllm serve`; the command itself may belong to another environment on PATH. -P keeps
    # the bundle's folder, which -m would put first, off the module path: it has a folder named vllm.
    command = [
        sys.executable,
        "-P",
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        "--config",
        str(settings.file.resolve()),
        *extra,
    ]
    env = vllm_environment.process_environment(on_cpu=settings.profile == "cpu") | {SCALES_VARIABLE: str(told)}
    with log.open("wb") as stream:
        return processes.start(
            command, cwd=settings.folder, env=env, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )


def _wait_until_healthy(
    server: Server, process: "subprocess.Popen[bytes]", timeout_s: float, on_wait: Progress | None, *, retry: bool
) -> bool:
    """Wait for /health; False when another process took the chosen port first and it is worth another try."""
    begin_s = time.monotonic()
    # trust_env=False: a proxy in the environment would be asked for 127.0.0.1.
    with httpx.Client(trust_env=False, timeout=5) as client:
        while True:
            waited_s = time.monotonic() - begin_s
            if process.poll() is not None:
                line = processes.telling_line(server.log)
                if retry and "ddress already in use" in line:
                    return False
                raise QuantkitError(f"vLLM did not start (exit {process.returncode}): {line} (whole log: {server.log})")
            if _is_healthy(client, server.base_url):
                return True
            if waited_s > timeout_s:
                raise QuantkitError(
                    f"vLLM was not ready after {timeout_s:.0f} s; its last line: {_last_line(server.log)} (whole log: "
                    f"{server.log}). Give it more time, or a machine that is less busy"
                )
            if on_wait:
                on_wait(waited_s, _last_line(server.log))
            time.sleep(0.5)


def _is_healthy(client: httpx.Client, base_url: str) -> bool:
    try:
        return client.get(f"{base_url}/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@contextmanager
def _ended_on_exit(process: "subprocess.Popen[bytes]", timeout_s: float) -> Iterator[None]:
    """End the process and its children when the block ends, also when this process itself is asked to end."""
    with _terminate_as_exit():
        try:
            yield
        finally:
            _end(process, timeout_s)


def _end(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """SIGTERM to the server, which winds its children down in order; SIGKILL to whoever of the group is left."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its pid is its group's: see start_new_session
    process.wait()


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack: by default Python dies on the spot and the server, in its own session, lives on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _group_leader_lives(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _free_port() -> int:
    """A port that nobody listens on at this moment; another process may still take it, hence the second try above."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is no hindrance
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _last_line(log: Path) -> str:
    lines = processes.log_tail(log, 1 << 13)
    return processes.bare(lines[-1]) if lines else ""
