"""What quantization will need before it begins: memory, disk and time, and whether the first two are there."""

import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch

from quantkit.architecture import INPUT_GROUPS, Architecture, layer_prefix, linear_shapes
from quantkit.capacity import duration
from quantkit.errors import raise_all
from quantkit.progress import spoken
from quantkit.quantize import fisher, schemes
from quantkit.quantize.gptq import FLOAT64_IN_FEATURES
from quantkit.quantize.layer import BATCH, Settings

_PROCESS = 760 << 20  # torch, transformers and a tokenizer, before any weight is read


class Need(NamedTuple):
    """Bytes at the peak, of one process; states in mapped files count as disk, not as memory. Seconds of wall time."""

    memory: int
    disk: int
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{_spoken(self.memory)} of memory, {_spoken(self.disk)} of disk, {spoken(self.seconds)}"


class Speed(NamedTuple):
    """Operations a second of matrix products: of the type that linears run in, and of float32."""

    compute: float
    float32: float


def speed(device: str, dtype: torch.dtype) -> Speed:
    """Measured on this machine, in a quarter of a second a type."""

    def of(dtype: torch.dtype) -> float:
        left, right = (torch.ones(1024, 1024, dtype=dtype, device=device) for _ in range(2))
        begin_s, done = time.monotonic(), 0
        while (spent_s := time.monotonic() - begin_s) < 0.25:
            float((left @ right)[0, 0])  # waits for a GPU
            done += 1
        return done * 2 * 1024**3 / spent_s

    return Speed(of(dtype), of(torch.float32))


def need(
    arch: Architecture, settings: Settings, *, samples: int, length: int, compute_bytes: int, speed: Speed | None = None
) -> Need:
    """The most that quantizing a checkpoint of this architecture takes; its memory is the same for 8 layers and for 80.

    compute_bytes: of an element of the type that linears run in, 2 or 4. Without a speed, the time is 0.
    """
    shapes = linear_shapes(arch)
    layer = sum(rows * columns for rows, columns in shapes.values())
    streams = len(settings.streams)
    # the layer as it was and as it becomes, and a copy to run for each stream where that is another type
    weights = layer * (4 + 4 + (streams * compute_bytes if compute_bytes != 4 else 0))
    choosing = max(
        _choosing(sum(shapes[name][0] for name in names), shapes[names[0]][1], settings) for names in INPUT_GROUPS
    )
    activations = BATCH * length * (3 * arch.intermediate_size + 4 * arch.hidden_size) * 4
    tokens = samples * length
    inside = tokens * (arch.num_heads * arch.head_dim * compute_bytes + arch.hidden_size * 4) * streams
    inside += tokens * arch.intermediate_size * compute_bytes  # what down_proj reads, of one stream
    states = 2 * streams * tokens * arch.hidden_size * 4
    outer = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    bits = settings.average_bits or settings.bits
    stored = schemes.plan(arch, settings.storage, settings.ignore, settings.overrides)
    packed = outer * 2 + sum(
        rows
        * columns
        * (
            (bits if storage == stored.usual else storage.bits) + 0.5
            if (storage := stored.of(layer_prefix(index) + name))
            else 16
        )
        / 8
        for index in range(arch.num_layers)
        for name, (rows, columns) in shapes.items()
    )
    disk = inside + states + 2 * packed
    memory = weights + choosing + activations
    if settings.output_curvature or settings.average_bits:
        blocks = 4 * _curvature(arch)
        seen = min(tokens, fisher.MAX_TOKENS)
        disk += (arch.num_layers + 1) * seen * arch.hidden_size * compute_bytes + seen * arch.hidden_size * 4
        disk += arch.num_layers * blocks
        # a layer's weights as read and as run, what autograd keeps of it; before that embedding, head and logits
        graph = fisher.BATCH * length * (8 * arch.intermediate_size + 16 * arch.hidden_size) * compute_bytes
        head = arch.vocab_size * (arch.hidden_size * (2 * 2 + compute_bytes) + 6 * 128 * 4)
        changes = 2 * layer * 4 if settings.average_bits else 0  # what rounding would change, by bits
        # while integers are chosen, a group's blocks are there shrunk and as factors too: gate's and up's are the most
        choosing = memory + (3 * blocks if settings.output_curvature else 0)
        memory = max(choosing, layer * (4 + compute_bytes) + blocks + changes + graph, head)
    seconds = _seconds(arch, settings, tokens, speed) if speed else 0.0
    return Need(_PROCESS + memory, round(disk), seconds)


def _choosing(rows: int, width: int, settings: Settings) -> int:
    """Bytes that choosing the integers of linears that read the same takes: rows of all of them, inputs of each."""
    square, weight = width * width * 4, rows * width * 4
    # the Gram matrix and that shrunk; the matrix to factor and its factor; the weight as it was and as it is rounded
    factor = 2 * square + 2 * square * (2 if width <= FLOAT64_IN_FEATURES else 1) + 2 * weight
    # the factor of all of it, and the weight, its columns, what they become, their integers
    rounding = 3 * square + 6 * weight
    # the Gram matrix, how it differs from the original's, both shrunk or factored; the weight, what is wanted, solved
    drift = 4 * square + 5 * weight if settings.drift_correction else 0
    return max(factor, rounding, drift)


def _curvature(arch: Architecture) -> int:
    """Elements of a layer's Fisher information, as the blocks that are kept of it."""
    return sum(size * size for rows, _ in linear_shapes(arch).values() for size in fisher.block_sizes(rows))


def _seconds(arch: Architecture, settings: Settings, tokens: int, speed: Speed) -> float:
    """From the products alone, and half as much again for all that is no product."""
    done = duration.quantizing(
        arch, tokens, streams=len(settings.streams), drift=settings.drift_correction > 0,
        curvature=_curvature(arch) if settings.output_curvature or settings.average_bits else 0,
        seen=min(tokens, fisher.MAX_TOKENS), rounds=settings.rounds,
    )  # fmt: skip
    return 1.5 * (done.compute / speed.compute + (done.float32 + done.everywhere) / speed.float32)


def check_room(needed: Need, folder: Path, *, memory_budget: int | None = None) -> None:
    """Refuse what cannot fit.

    memory_budget: bytes that may be used instead of all that the machine gives. Hidden states do not count: they lie in
        mapped files, whose pages the kernel takes back when it wants them.

    Raises:
        QuantkitError: too little memory or disk, with what would need less.
    """
    free_disk = shutil.disk_usage(folder).free
    memory = _memory_limit()
    problems = []
    if needed.memory > min(memory, memory_budget or memory):
        giver = "this machine" if needed.memory > memory else "--memory-budget"
        remedy = "a larger machine" if needed.memory > memory else "a larger budget"
        problems.append(
            f"quantization needs about {_spoken(needed.memory)} of memory and {giver} gives "
            f"{_spoken(min(memory, memory_budget or memory))}: lower the calibration's length, or take {remedy}"
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


def parse_bytes(text: str) -> int:
    """`16GiB`, `500 MB`, `8g` as bytes; units are powers of 1024 with an i or as one letter, of 1000 with a B alone.

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", text.lower())
    if found is None:
        raise ValueError(f"{text!r} is no size: write it as 16GiB or 500MB")
    number, letter, ending = found.groups()
    base = 1000 if ending == "b" else 1024
    return int(float(number) * base ** " kmgt".index(letter or " "))


def _spoken(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
