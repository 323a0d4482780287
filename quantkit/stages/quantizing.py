"""An FP16 checkpoint, and 4-bit weights of it: by the native engine, or by another one behind its contract."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__, hardware, text
from quantkit.artifacts import Work
from quantkit.engines import registry
from quantkit.errors import QuantkitError, raise_all
from quantkit.formats import Storage
from quantkit.progress import LINE, Report
from quantkit.recipe import Quantize, TextWindows
from quantkit.stages.stage import Stage, check_cluster, open_inputs

if TYPE_CHECKING:
    from quantkit import ranks
    from quantkit.checkpoint import Checkpoint
    from quantkit.quantize.kv_scales import KvNote
    from quantkit.quantize.layer import Settings
    from quantkit.tokens import TokenSet

# What every engine takes, each within its limits.
_FOR_ALL = {"engine", "engine_options", "method", "format", "bits", "group_size", "symmetric"}
_FOR_ALL |= {"kv_cache", "uncalibrated_kv_cache"}
_NATIVE_METHODS = ("gptq", "awq", "awq+gptq")


def import_checkpoint(gguf: Path) -> Stage:
    """A GGUF file as an FP16 safetensors checkpoint."""

    def make(work: Work, report: Report) -> None:
        from quantkit.gguf import convert_gguf

        report("converting to FP16 safetensors", 0, 0)
        work.results |= convert_gguf(gguf, work.out)

    return Stage("checkpoint", "checkpoint", {"gguf": gguf}, {}, make)


def quantize(
    checkpoint: Path, *, calibration: TextWindows, settings: Quantize, seed: int, device: str = "cpu",
    memory_budget: int | None = None, hand_out: "ranks.HandOut" = lambda order: None, cluster: str | None = None,
) -> Stage:  # fmt: skip
    """FP16 checkpoint -> 4-bit checkpoint that vLLM loads, by the native engine or another one.

    The native engine goes on where an interrupted run stopped; any other begins again. `hand_out` tells other processes
    to help. On a Ray cluster the checkpoint writes what it is to be calibrated on besides.

    Raises:
        QuantkitError: everything that the settings ask for and the engine does not do; a cluster, and no Ray here.
    """
    check_cluster(cluster)
    raise_all(engine_problems(settings, memory_budget=memory_budget))
    native = settings.engine == "native"

    def make(work: Work, report: Report) -> None:
        from quantkit import checkpoint as checkpoints

        source = checkpoints.open_checkpoint(checkpoint, quantized=False)
        for limit in _limits(source, settings):
            report(limit, 0, LINE)

        def windows(continuations: int = 0) -> "TokenSet":
            return _calibration_windows(
                calibration, checkpoint, continuations, seed=seed, folder=work.partial, report=report, cluster=cluster
            )

        if native:
            found = _natively(
                source, calibration, windows, settings, seed=seed, device=device, memory_budget=memory_budget,
                hand_out=hand_out, work=work, report=report,
            )  # fmt: skip
        else:
            found = _by_contract(source, windows(), settings, seed=seed, device=device, work=work, report=report)
        checkpoints.open_checkpoint(work.out, quantized=True)
        work.results |= {
            "weights_bytes": sum(file.stat().st_size for file in work.out.glob("*.safetensors")),
            "source_weights_bytes": sum(file.stat().st_size for file in set(source.shards.values())),
            "device": device,
        } | found

    shape = {"quantize": settings.model_dump(), "calibration": _windows(calibration), "seed": seed}
    if not native:
        shape["pins"] = registry.digest(settings.engine)
    inputs = {"checkpoint": checkpoint}
    return Stage("quantize", "quantized", inputs, shape, make, look=lambda: open_inputs(checkpoint, quantized=False))


def engine_problems(settings: Quantize, *, memory_budget: int | None = None) -> list[str]:
    """Everything that the settings ask of their engine and that it does not do, with what to choose instead."""
    asked = settings.model_dump()
    if settings.engine != "native":
        besides = {name: asked[name] for name in settings.model_fields_set - _FOR_ALL}
        besides |= {} if memory_budget is None else {"memory_budget": memory_budget}
        besides |= {} if int(os.environ.get("WORLD_SIZE", "1")) < 2 else {"torchrun": True}
        return registry.problems(settings.engine, asked, besides)
    problems = []
    if settings.engine_options:
        problems.append(
            f"engine native takes no engine_options ({', '.join(settings.engine_options)}): its settings have names of "
            "their own, see docs/quantize.md"
        )
    if settings.method is not None and settings.method not in _NATIVE_METHODS:
        others = [name for name, engine in registry.ENGINES.items() if settings.method in engine.methods]
        problems.append(
            f"engine native has no method {settings.method}: choose {', '.join(_NATIVE_METHODS)}, or the engine "
            f"{' or '.join(others)}"
        )
    return problems


def _limits(source: "Checkpoint", settings: Quantize) -> list[str]:
    """Refuse what vLLM would not load; returns what only some devices load."""
    if settings.engine != "native":
        return registry.check(source.arch, _stored(settings))
    from quantkit.quantize import stream

    return stream.check_settings(source, native_settings(settings))


def native_settings(settings: Quantize) -> "Settings":
    """The native engine's settings."""
    from quantkit.quantize.kv_scales import KvSettings
    from quantkit.quantize.layer import Settings

    of_cache = {"kv_cache", "kv_scales", "kv_strategy", "uncalibrated_kv_cache"}
    native = settings.model_dump(exclude={"engine", "engine_options", "format"} | of_cache)
    calibrated = settings.kv_cache == "fp8" and not settings.uncalibrated_kv_cache
    kept = KvSettings(settings.kv_scales, settings.kv_strategy) if calibrated else None
    return Settings.of(**native, format=settings.format or "compressed-tensors", kv_cache=kept)


def _stored(settings: Quantize) -> Storage:
    """How another engine stores linears."""
    assert settings.bits != "auto"  # engine_problems
    return registry.storage(
        settings.engine, method=settings.method, bits=settings.bits, group_size=settings.group_size,
        symmetric=settings.symmetric,
    )  # fmt: skip


def _natively(
    source: "Checkpoint", calibration: TextWindows, read: "Callable[[int], TokenSet]", settings: Quantize, *, seed: int,
    device: str, memory_budget: int | None, hand_out: "ranks.HandOut", work: Work, report: Report,
) -> dict[str, Any]:  # fmt: skip
    """The native engine: layer by layer, going on where it was interrupted.

    read: gives the calibration windows, and so many that the model writes for each.
    """
    from quantkit import checkpoint as checkpoints
    from quantkit.quantize import estimate, layer, stream

    begin_s, plan = time.monotonic(), native_settings(settings)
    written = layer.continuations(plan, source.arch, calibration.samples * calibration.length)
    hardware.keep_freed_memory()
    compute = hardware.compute_dtype(device)
    needed = estimate.need(
        source.arch, plan, samples=calibration.samples * (1 + written), length=calibration.length,
        compute_bytes=compute.itemsize, speed=estimate.speed(device, compute),
    )  # fmt: skip
    report(f"needs about {needed}", 0, LINE)
    estimate.check_room(needed, work.out, memory_budget=memory_budget)
    windows = read(written)
    checkpoints.check_finite(source, lambda done, total: report("checking the weights, tensor", done, total))
    layers = work.partial / "layers"
    hand_out(stream.Order(source.path, windows, plan, layers))
    notes = stream.quantize_layers(source, windows, plan, folder=layers, device=device, report=report)
    special = stream.storages(source.arch, stream.settled(plan, layers)).special
    report("writing", 0, 0)
    hardware.give_back_freed_memory()  # embedding and head are read whole, and would come on top
    stream.write_checkpoint(source, plan, folder=layers, out=work.out)
    cost = work.cost()
    return {
        "engine": {
            "name": "native", "version": __version__, "method": plan.method,
            "wall_s": round(time.monotonic() - begin_s, 3), "peak_memory_bytes": cost["peak_memory_bytes"],
        },
        **_counted(windows),
        "continuations": written,
        "estimated": needed._asdict(),
        "method": plan.method,
        "drift_correction": plan.drift_correction,
        "output_curvature": plan.output_curvature,
        "shrinkage": plan.shrinkage,
        "rounds": plan.rounds,
        "allocation": stream.allocation(layers),
        "special": {name: storage and storage._asdict() for name, storage in special.items()},  # null: 16 bits
        "linears": [note._asdict() for note in notes],
        "kv_cache": _kv_cache(settings, stream.kv_notes(layers, source.arch.num_layers)),
    }  # fmt: skip


def _kv_cache(settings: Quantize, notes: "Sequence[Sequence[KvNote]]") -> dict[str, Any] | None:
    """What the manifest says of the KV cache: of which type, and each layer's scales."""
    if settings.kv_cache == "no":
        return None
    if settings.uncalibrated_kv_cache:
        return {"type": settings.kv_cache, "calibrated": False}
    layers = [
        {note.name: {n: v for n, v in note._asdict().items() if n != "name"} for note in layer} for layer in notes
    ]
    return {
        "type": settings.kv_cache, "calibrated": True, "chosen_by": settings.kv_scales,
        "strategy": settings.kv_strategy, "layers": layers,
    }  # fmt: skip


def _by_contract(
    source: "Checkpoint", windows: "TokenSet", settings: Quantize, *, seed: int, device: str, work: Work, report: Report
) -> dict[str, Any]:
    """Another engine: a process of its own, whose result is checked before it counts."""
    from quantkit import checkpoint as checkpoints
    from quantkit.engines import run

    checkpoints.check_finite(source, lambda done, total: report("checking the weights, tensor", done, total))
    ran = run.quantize(
        settings.engine, source, windows.input_ids_ST, method=settings.method, stored=_stored(settings),
        options=settings.engine_options, seed=seed, device=device, out=work.out, folder=work.partial, report=report,
    )  # fmt: skip
    # of single linears an engine says nothing
    return {
        "engine": ran, "method": ran["method"], **_counted(windows), "linears": [], "kv_cache": _kv_cache(settings, []),
    }  # fmt: skip


def _counted(windows: "TokenSet") -> dict[str, Any]:
    return {"calibration_tokens": windows.input_ids_ST.numel(), "adds_bos": windows.adds_bos}


def _windows(settings: TextWindows) -> dict[str, Any]:
    return {"text": text.describe(settings.text), "samples": settings.samples, "length": settings.length}


def _calibration_windows(
    calibration: TextWindows, checkpoint: Path, continuations: int, *, seed: int, folder: Path, report: Report,
    cluster: str | None,
) -> "TokenSet":  # fmt: skip
    """The windows to calibrate on: of the sources, with the chats of `self:N`, and what the model makes of them."""
    from quantkit import conversations, tokens
    from quantkit.offline import Session

    written: dict[str, Sequence[text.Document]] = {}
    with Session(cluster=cluster) as session:  # which starts vLLM when it is asked for something
        for source in calibration.text:
            count = text.self_prompts(source)
            if count is not None:
                written[source] = conversations.chats(
                    session, checkpoint, count, prompt_tokens=128, answer_tokens=256, temperature=1.0, seed=seed,
                    folder=folder, report=report,
                )  # fmt: skip
                if not written[source]:
                    raise QuantkitError(
                        f"{source}: {checkpoint} finished none of the prompts that it wrote: give text from a file, or "
                        "an instruct model"
                    )
        windows = tokens.tokenize(
            calibration.text, tokens.load_tokenizer(checkpoint), samples=calibration.samples,
            length=calibration.length, seed=seed, written=written,
        )  # fmt: skip
        return conversations.extended(
            session, checkpoint, windows, continuations, seed=seed, folder=folder, report=report
        )
