"""The installed vLLM: which build it is, the environment its processes get, and what its logs say went wrong."""

import functools
import importlib.metadata
import os
import re
import tempfile
from pathlib import Path
from typing import Literal

from quantkit import artifacts

# What a server needs of its surroundings. Everything else stays outside, above all VLLM_SERVER_DEV_MODE, PYTHONPATH,
# LD_PRELOAD (an Intel OpenMP there spins on a shared machine) and the caller's tokens.
_PASSED_ON = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME",
    "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME", "VLLM_API_KEY", "VLLM_CACHE_ROOT", "VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_INT4_W4A8",
)  # fmt: skip

INSTALL_HINT = "install quantkit[cpu] or quantkit[cuda]"


def distribution() -> tuple[Literal["vllm", "vllm-cpu"], str] | None:
    """Which distribution of vLLM is installed, and its version; None where there is none."""
    names: tuple[Literal["vllm", "vllm-cpu"], ...] = ("vllm", "vllm-cpu")
    for name in names:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build."""
    found = distribution()
    return found is not None and (found[0] == "vllm-cpu" or "cpu" in found[1])


def process_environment(*, on_cpu: bool) -> dict[str, str]:
    """The whole environment of a vLLM process: an allow-list of the caller's, offline, without usage statistics.

    The CPU build is distributed as `vllm-cpu`, but vLLM (and lm-eval) ask for the metadata of `vllm` and die without.
    A directory with these three lines, first on PYTHONPATH, answers them; the installed package is not touched.
    """
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if on_cpu:
        # Idle OpenMP threads must sleep: the default spins, and on a machine with few cores the threads of worker,
        # engine and server then fight for them at a hundredth of the speed.
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_TARGET_DEVICE": "cpu"}
        # On AMX processors vLLM would run 4-bit weights with 8-bit activations, other numbers than anywhere else.
        environment.setdefault("VLLM_CPU_INT4_W4A8", "0")
    found = distribution()
    if found is not None and found[0] == "vllm-cpu":
        environment["PYTHONPATH"] = str(_metadata_directory(found[1]))
    return environment


def telling_line(log: Path) -> str:
    """The line of a vLLM log that says best why it died: its last error that is not the wrapper of an earlier one."""
    lines = log_tail(log, 1 << 18)
    errors = [line for line in lines if _ERROR.search(line) and not _WRAPPER.search(line)]
    return bare((errors or lines or ["it printed nothing"])[-1])[:500]


_ERROR = re.compile(r"\b\w*(Error|Exception|Interrupt)\b: \S|: error: ")
_WRAPPER = re.compile(r"See root cause above|Engine core initialization failed|WorkerProc initialization failed")
# "(EngineCore pid=12) ERROR 11-23 02:00:00 [core.py:99] " before the text that matters
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?((ERROR|WARNING|INFO) \S+ \S+ (\[\S+\] )?)?")


def bare(line: str) -> str:
    """A log line without its prefix of process, level and time."""
    return _PREFIX.sub("", line).strip()


def log_tail(log: Path, num_bytes: int) -> list[str]:
    """The lines in the last bytes of a log; a carriage return ends a line too."""
    if not log.is_file():
        return []
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - num_bytes))
        text = stream.read().decode(errors="replace")
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@functools.cache
def _metadata_directory(version: str) -> Path:
    """A directory with the metadata of a distribution `vllm`, private to this user: it goes on PYTHONPATH."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return _write_metadata(cache / "quantkit" / f"vllm-metadata-{version}", version)
    except OSError:  # a read-only home, as in a container
        return _write_metadata(Path(tempfile.mkdtemp(prefix="quantkit-vllm-")), version)


def _write_metadata(directory: Path, version: str) -> Path:
    name = f"{version}+cpu"  # vLLM looks for the word cpu in the version to know its platform
    metadata = directory / f"vllm-{name}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    artifacts.write_text(metadata, f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n")
    return directory
