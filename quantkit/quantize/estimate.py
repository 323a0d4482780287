"""What quantization will need before it begins: memory, disk, and whether they are there."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from quantkit.architecture import Architecture, linear_shapes
from quantkit.errors import raise_all
from quantkit.quantize.gptq import FLOAT64_IN_FEATURES
from quantkit.quantize.layer import BATCH, Settings

_PROCESS = 700 << 20  # torch, transformers and a tokenizer, before any weight is read


class Need(NamedTuple):
    """Bytes at the peak, of one process; states in mapped files count as disk, not as memory."""

    memory: int
    disk: int

    def __str__(self) -> str:
        return f"{_spoken(self.memory)} of memory, {_spoken(self.disk)} of disk"


def need(arch: Architecture, settings: Settings, *, samples: int, length: int, compute_bytes: int) -> Need:
    """The most that quantizing a checkpoint of this architecture takes; the same for 8 layers and for 80.

    compute_bytes: of an element of the type that linears run in, 2 or 4.
    """
    shapes = linear_shapes(arch)
    layer = sum(rows * columns for rows, columns in shapes.values())
    streams = 2 if settings.drift_correction else 1
    widest = max(columns for _, columns in shapes.values())
    # the layer as it was and as it becomes, and a copy to run for each stream where that is another type
    weights = layer * (4 + 4 + (streams * compute_bytes if compute_bytes != 4 else 0))
    # sums over the inputs of the widest linear, then its factorisation: the matrix, its factor, the inverse
    sums = widest * widest * 4 * streams
    factor = 3 * widest * widest * (8 if widest <= FLOAT64_IN_FEATURES else 4)
    stacked = 6 * 2 * arch.intermediate_size * arch.hidden_size * 4  # gate and up in one: target, columns, integers
    activations = BATCH * length * (3 * arch.intermediate_size + 4 * arch.hidden_size) * 4
    tokens = samples * length
    inside = tokens * (arch.num_heads * arch.head_dim * compute_bytes + arch.hidden_size * 4) * streams
    states = 2 * streams * tokens * arch.hidden_size * 4
    outer = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    packed = arch.num_layers * layer * (settings.bits + 0.5) / 8 + outer * 2
    return Need(_PROCESS + weights + sums + factor + stacked + activations, round(inside + states + 2 * packed))


def check_room(needed: Need, folder: Path) -> None:
    """Refuse what cannot fit.

    Raises:
        QuantkitError: too little memory or disk, with what would need less.
    """
    free_disk = shutil.disk_usage(folder).free
    memory = _memory_limit()
    problems = []
    if needed.memory > memory:
        problems.append(
            f"quantization needs about {_spoken(needed.memory)} of memory and this machine gives "
            f"{_spoken(memory)}: lower the calibration's length, or take a larger machine"
        )
    if needed.disk > free_disk:
        problems.append(
            f"quantization needs about {_spoken(needed.disk)} on the disk of {folder}, and "
            f"{_spoken(free_disk)} are free: lower the calibration's samples, or give --out on another disk"
        )
    raise_all(problems)


def _memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's where that is less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine


def _spoken(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
