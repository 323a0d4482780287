"""Which other tools there are, what each of them takes, and whether its upstream still lives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import provenance, vllm_support
from quantkit.architecture import Architecture, linear_shapes
from quantkit.errors import raise_all
from quantkit.formats import Storage

_HERE = Path(__file__).parent


class Grids(NamedTuple):
    """The format that a method of an engine writes, by the grid that is asked for; None: it has no such grid."""

    symmetric: str | None
    asymmetric: str | None


class Engine(NamedTuple):
    """One tool that others wrote."""

    package: str
    version: str
    methods: Mapping[str, Grids]  # the first is the one that runs when none is asked for
    bits: tuple[int, ...]  # none: it does not quantize
    upstream: str  # alive or not, and since when
    instead: str  # what to use in its place
    disk_gb: float  # of its environment, with a CPU build of torch
    minutes: float  # that making it took, on two cores


# What quantizes: `quantize --engine`.
ENGINES: Mapping[str, Engine] = {
    "autoawq": Engine(
        "autoawq", "0.2.9", {"awq": Grids(None, "awq")}, (4,),
        "ended: deprecated by its author in May 2025", "native, or llmcompressor --method awq", 1.2, 2,
    ),
    "autogptq": Engine(
        "auto-gptq", "0.7.1", {"gptq": Grids("gptq", None)}, (4, 8),
        "ended: last release in March 2024", "native --method gptq, or gptqmodel", 1.2, 2,
    ),
    "gptqmodel": Engine(
        "gptqmodel", "7.7.0", {"gptq": Grids("gptq", None), "gptaq": Grids("gptq", None), "awq": Grids(None, "awq")},
        (4, 8), "alive: released in October 2026", "native, whose drift correction is GPTAQ's", 1.2, 2,
    ),
    "llmcompressor": Engine(
        "llmcompressor", "0.14.0.1",
        dict.fromkeys(("gptq", "awq", "awq+gptq"), Grids("compressed-tensors", "compressed-tensors")), (4, 8),
        "alive: released in October 2026", "native", 1.2, 2,
    ),
    "autoround": Engine(
        "auto-round", "0.16.1", {"autoround": Grids("gptq", "awq")}, (4,),
        "alive: released in October 2026", "native --effort high", 1.2, 2,
    ),
}  # fmt: skip
# What trains drafts of kinds that quantkit does not train itself: `train-draft --kind`.
DRAFT_ENGINES: Mapping[str, Engine] = {
    "speculators": Engine(
        "speculators", "0.9.0", {"eagle3": Grids(None, None)}, (),
        "alive: released in November 2026", "native: a draft of its own layers", 1.0, 2,
    ),
}  # fmt: skip
# All that have an environment.
EVERY: Mapping[str, Engine] = {**ENGINES, **DRAFT_ENGINES}


def worker(name: str) -> Path:
    """The script that runs the engine, under the engine's own Python."""
    return _HERE / "workers" / f"{name}.py"


def requirements(name: str) -> Path:
    """The engine's pins: inside the package when it is installed, `requirements/engines/` in a checkout."""
    packaged = _HERE / "requirements" / f"{name}.txt"
    return packaged if packaged.is_file() else _HERE.parents[1] / "requirements" / "engines" / f"{name}.txt"


def storage(name: str, *, method: str | None, bits: int, group_size: int, symmetric: bool) -> Storage:
    """How the linears will lie in the engine's checkpoint. What it can not do is an assertion: see `problems`."""
    grids = ENGINES[name].methods[method or default_method(name)]
    stored = grids.symmetric if symmetric else grids.asymmetric
    assert stored is not None
    return Storage(stored, bits, group_size, symmetric)


def default_method(name: str) -> str:
    """The method that runs when none is asked for."""
    return next(iter(ENGINES[name].methods))


def problems(name: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Every reason why an engine can not do what is asked, with what to choose instead.

    settings: method, format (None: its own), bits, group_size, symmetric.
    given: what was asked for besides, by name; an engine has its own way with all of it.
    """
    engine, found = ENGINES[name], []
    method = settings["method"] or default_method(name)
    if given:
        found.append(
            f"engine {name} takes no {', '.join(sorted(given))}: leave out, or choose the native engine; what is the "
            "engine's own is an engine option"
        )
    if settings["bits"] not in engine.bits:
        found.append(
            f"engine {name} has no bits {settings['bits']}: choose {' or '.join(map(str, engine.bits))}, or native"
        )
    if method not in engine.methods:
        found.append(f"engine {name} has no method {method}: choose {' or '.join(engine.methods)}")
        return found
    grids = engine.methods[method]
    for asked, has, other in ((True, grids.symmetric, "asymmetric"), (False, grids.asymmetric, "symmetric")):
        if settings["symmetric"] is asked and has is None:
            grid = "symmetric" if asked else "asymmetric"
            found.append(f"{method} of engine {name} is not stored with an {grid} grid: choose {other}".replace(
                "an s", "a s"))  # fmt: skip
        elif settings["symmetric"] is asked and settings["format"] not in (None, has):
            found.append(
                f"{method} of engine {name} is stored as {has} here, not as {settings['format']}: leave format out"
            )
    return found


def check(arch: Architecture, stored: Storage) -> list[str]:
    """Refuse what vLLM would not load of an engine's result; returns what only some devices load.

    Raises:
        QuantkitError: each reason, with what to choose instead.
    """
    asked = stored._asdict() | {"shapes": linear_shapes(arch)}
    raise_all(vllm_support.unsupported(**asked))
    return vllm_support.cuda_only(**asked) + vllm_support.cpu_only(**asked)


def hashes(name: str) -> Path:
    """The SHA-256 of each file that may be installed for the engine's pins."""
    pins = requirements(name)
    return pins.parent / "hashes" / pins.name


def digest(name: str) -> str:
    """What names an engine's environment: its pins and nothing else."""
    return provenance.file_digest(requirements(name))[:12]
