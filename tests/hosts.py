"""Two hosts on one machine: network namespaces joined by a veth pair, where the user may make some."""

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

LINK = "eth0"  # of either host
PORT = 29500  # nobody else listens in a namespace that was just made


_LIBC, _CLONE_NEWNET = ctypes.CDLL(None, use_errno=True), 0x40000000  # os.setns is of Python 3.12


class Host(NamedTuple):
    """A network namespace: its name, and its address on the link to the other one."""

    name: str
    address: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and what it starts, is on the host while the block runs."""
        here, there = (
            os.open(path, os.O_RDONLY) for path in ("/proc/thread-self/ns/net", f"/run/netns/{self.name}")
        )  # fmt: skip
        try:
            _enter(there)
            yield
        finally:
            _enter(here)
            os.close(here), os.close(there)

    def start(self, *words: object, **settings: Any) -> "subprocess.Popen[str]":
        """Start a command on this host, in a session of its own."""
        with self.inside():
            return subprocess.Popen(list(map(str, words)), text=True, start_new_session=True, **settings)

    def processes(self, word: str = "") -> set[int]:
        """Its living processes that have a word in their command."""
        found = set()
        for line in _ip("netns", "pids", self.name).stdout.split():
            with suppress(ProcessLookupError, FileNotFoundError):
                command = Path(f"/proc/{line}/cmdline").read_bytes()  # nothing of one that has ended
                if command and word.encode() in command:
                    found.add(int(line))
        return found

    def kill(self, word: str = "") -> None:
        """End those processes, and wait until they are gone."""
        while left := self.processes(word):
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def cut(self) -> None:
        """Take the link down: the other host hears nothing of this one any more, not even that it is gone."""
        _ip("-n", self.name, "link", "set", LINK, "down", check=True)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*words: str, check: bool = False) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other and nobody else; whatever runs on them when the block ends is ended.

    Skips the test where no namespace can be made.
    """
    stem = f"quantkit-{secrets.token_hex(3)}"
    hosts = Host(f"{stem}-a", "10.77.0.1"), Host(f"{stem}-b", "10.77.0.2")
    try:
        for host in hosts:
            made = _ip("netns", "add", host.name)
            if made.returncode:
                pytest.skip(f"needs the right to make network namespaces: {made.stderr.strip()}")
        _ip(
            "link",
            "add",
            LINK,
            "netns",
            hosts[0].name,
            "type",
            "veth",
            "peer",
            LINK,
            "netns",
            hosts[1].name,
            check=True,
        )
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", LINK, check=True)
            for link in ("lo", LINK):
                _ip("-n", host.name, "link", "set", link, "up", check=True)
        yield hosts
    except FileNotFoundError:
        pytest.skip("needs ip, of iproute2")
    finally:
        for host in hosts:
            with suppress(FileNotFoundError):
                host.kill()
                _ip("netns", "delete", host.name)


def torchrun(hosts: tuple[Host, Host], *words: object, **settings: Any) -> "list[subprocess.Popen[str]]":
    """A command by torchrun over both hosts, one rank on each; rank 0 is the first host's."""
    return [
        host.start(
            sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--node-rank", rank,
            "--master-addr", hosts[0].address, "--master-port", PORT, "--no-python", *words,
            env=os.environ | {"GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1"}, **settings,
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts for one test."""
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="session")
def on_both() -> Callable[..., "list[subprocess.Popen[str]]"]:
    """Starts a command by torchrun on two hosts."""
    return torchrun


@pytest.fixture(scope="session")
def make_hosts() -> Callable[..., Any]:
    """Two hosts for the length of a block."""
    return two_hosts
