"""The installed vLLM: which build it is, and the environment its processes get."""

import functools
import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Literal

from quantkit import artifacts, processes
from quantkit.errors import QuantkitError

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
    # vllm-cpu first: where our stand-in for the metadata of `vllm` is on the path, both are found
    names: tuple[Literal["vllm", "vllm-cpu"], ...] = ("vllm-cpu", "vllm")
    for name in names:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_ray() -> None:
    """Refuse to ask a Ray cluster without Ray.

    Raises:
        QuantkitError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise QuantkitError(
            "Ray is not installed: install quantkit[ray] on every machine of the cluster, or leave out --on and the "
            "recipe's cluster"
        )


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build."""
    found = distribution()
    return found is not None and (found[0] == "vllm-cpu" or "cpu" in found[1])


def process_environment(*, on_cpu: bool) -> dict[str, str]:
    """The whole environment of a vLLM process: an allow-list of the caller's, offline, without usage statistics."""
    environment = processes.passed_on(_PASSED_ON) | settings(on_cpu=on_cpu)
    found = metadata()
    return environment if found is None else environment | {"PYTHONPATH": str(found)}


def settings(*, on_cpu: bool) -> dict[str, str]:
    """What a vLLM process is told through its environment, wherever it runs."""
    environment = {
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
        environment["VLLM_CPU_INT4_W4A8"] = os.environ.get("VLLM_CPU_INT4_W4A8", "0")
    return environment


def one_process(*, on_cpu: bool) -> dict[str, str]:
    """What a process that holds its engine itself is told besides."""
    if not on_cpu:
        return {}
    # One engine in this one process, on half of the cores: where other processes want the same cores, OpenMP's threads
    # wait for each other, and a token was seen to take twenty times as long.
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // 2, 1)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def metadata() -> Path | None:
    """A directory that must be on PYTHONPATH of a vLLM process; None where it needs none.

    The CPU build is distributed as `vllm-cpu`, but vLLM (and lm-eval) ask for the metadata of `vllm` and die without.
    A directory with these three lines answers them; the installed package is not touched.
    """
    found = distribution()
    return _metadata_directory(found[1]) if found is not None and found[0] == "vllm-cpu" else None


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
