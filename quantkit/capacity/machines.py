"""Which machine is planned for: a GPU of the table, one of the user's own, or this machine's processor."""

import difflib
import functools
import importlib.resources
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, PositiveFloat, PositiveInt

from quantkit.capacity.roofline import Machine, Measured
from quantkit.errors import QuantkitError
from quantkit.recipe import Section, check, read_yaml

CPU = "cpu"  # stands for the processor of this machine
ASSUMED = "h100-80gb"  # where a GPU is meant and none was named


class Source(Section):
    """Where the figures are from."""

    title: str
    url: str


class Gpu(Section):
    """One accelerator, or a processor that stands for one. Figures are dense ones; those of a GPU are a data sheet's.

    measured: of a processor, its matrix products and what the start of a layer takes; its memory bandwidth counts for
    the KV cache alone then.
    """

    title: str
    memory_mib: PositiveInt
    bandwidth_gb_s: PositiveFloat
    bf16_tflops: PositiveFloat
    fp8_tflops: PositiveFloat | None = None
    gpus_per_node: Annotated[int, Field(gt=0)] = 8
    source: Source | None = None
    measured: Measured | None = None

    @property
    def memory_bytes(self) -> int:
        """All of its memory, as its driver counts it."""
        return self.memory_mib << 20

    def roof(self, *, fp8: bool = False) -> Machine:
        """What the roofline knows of it; with `fp8` its rate of FP8 products, where it has one."""
        tflops = (fp8 and self.fp8_tflops) or self.bf16_tflops
        return Machine(self.title, self.bandwidth_gb_s * 1e9, tflops * 1e12, self.measured)


@functools.cache
def table() -> dict[str, Gpu]:
    """The GPUs that are known by name."""
    text = importlib.resources.files("quantkit.capacity").joinpath("machines.yaml").read_text(encoding="utf-8")
    return {name: check(Gpu, entry, where=f"machines.yaml, {name}") for name, entry in yaml.safe_load(text).items()}


def asked(text: str) -> tuple[str, int]:
    """`NAME`, `FILE.yaml` or `cpu`, and how many of it: `h100-80gb:4`."""
    name, colon, number = text.rpartition(":")
    if not colon:
        return text, 1
    if not number.isdigit() or int(number) < 1:
        raise QuantkitError(f"--gpu {text}: {number!r} is no number of GPUs: write it as h100-80gb:4")
    return name, int(number)


def find(name: str) -> Gpu:
    """The GPU of that name or file.

    Raises:
        QuantkitError: neither is there, with the nearest names; or the file is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        return check(Gpu, read_yaml("GPU", Path(name), see="docs/plan.md for what such a file holds"), where=name)
    known = table()
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    raise QuantkitError(f"--gpu {name} is not known; {hint} (cpu is this machine's processor, FILE.yaml your own GPU)")


def save(gpu: Gpu, path: Path) -> None:
    """Write a machine as a file that `find` reads."""
    from quantkit import artifacts

    artifacts.write_text(path, yaml.safe_dump(gpu.model_dump(exclude_none=True), sort_keys=False))
