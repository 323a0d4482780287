"""What flows: each stage as a function from directories to a directory, with what its manifest will say."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quantkit import __version__, architecture, artifacts, hardware, text, vllm_environment
from quantkit.artifacts import Kind, Manifest, Work
from quantkit.engines import registry
from quantkit.errors import GateFailed, GateUndecided, QuantkitError, raise_all
from quantkit.formats import Storage
from quantkit.kv_scheme import has_kv_scheme
from quantkit.progress import LINE, Display, Report
from quantkit.recipe import Bench, Draft, Evaluate, Quantize, Serve, TextWindows

if TYPE_CHECKING:
    from quantkit import ranks
    from quantkit.checkpoint import Checkpoint
    from quantkit.evaluate.report import Acceptance, Candidate
    from quantkit.offline import Session
    from quantkit.quantize.kv_scales import KvNote
    from quantkit.quantize.layer import Settings
    from quantkit.speculation import Plan, Profile
    from quantkit.tokens import TokenSet

# What every engine takes, each within its limits.
_FOR_ALL = {"engine", "engine_options", "method", "format", "bits", "group_size", "symmetric"}
_FOR_ALL |= {"kv_cache", "uncalibrated_kv_cache"}
_NATIVE_METHODS = ("gptq", "awq", "awq+gptq")
_HEAD_ENGINE = "speculators"
_DRAFT_WINDOWS, _DRAFT_WINDOW = 128, 512  # that a draft's 4-bit weights are calibrated on at most, and their tokens


class Stage(NamedTuple):
    """A stage before it runs. `inputs` are digested and `settings` recorded; together they name the work."""

    title: str
    kind: Kind
    inputs: dict[str, Path]
    settings: dict[str, Any]
    make: Callable[[Work, Report], None]
    verdict: Callable[[Manifest], None] = lambda manifest: None  # raises when the result must stop the run
    look: Callable[[], object] = lambda: None  # raises when an input is not whole, before anything of `out` is touched

    def key(self) -> tuple[str, dict[str, str]]:
        """The name of the work, and the digests of its inputs."""
        digests = {name: artifacts.digest(path) for name, path in self.inputs.items()}
        return artifacts.work_key(self.kind, digests, self.settings), digests


def run_stage(stage: Stage, out: Path, *, display: Display, replace: bool = False) -> Manifest:
    """Run a stage into `out`, or say that what is there is fresh.

    Raises:
        QuantkitError: wrong input, `out` holds another run, or the stage's verdict.
    """
    key, digests = stage.key()
    if artifacts.is_fresh(out, key):
        display.console.print(f"[green]fresh[/] [bold]{stage.title}[/] ({out})", highlight=False)
        artifacts.tidy(out)
    else:
        stage.look()
        with (
            display.stage(stage.title) as report,
            artifacts.making(out, stage.kind, inputs=digests, settings=stage.settings, replace=replace) as work,
        ):
            stage.make(work, report)
    manifest = artifacts.read_manifest(out)
    assert manifest is not None
    stage.verdict(manifest)
    return manifest


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
    _check_cluster(cluster)
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
    return Stage("quantize", "quantized", inputs, shape, make, look=lambda: _open(checkpoint, quantized=False))


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

    return stream.check_settings(source, _plan(settings))


def _plan(settings: Quantize) -> "Settings":
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

    begin_s, plan = time.monotonic(), _plan(settings)
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


def evaluate(
    candidates: Sequence[Path], reference: Path, *, settings: Evaluate, seed: int, draft: Path | None = None,
    note: str = "", device: str = "cpu", hand_out: "ranks.HandOut" = lambda order: None, cluster: str | None = None,
) -> Stage:  # fmt: skip
    """Candidates against their reference; the verdict stops the run when a gate fails, or cannot tell.

    draft: the acceptance of this draft before each candidate is measured by vLLM, here.
    hand_out, cluster: other processes, and a Ray cluster, that help; what they do decides no byte.

    Raises:
        QuantkitError: no such profile of limits, or task; a cluster, and no Ray here.
    """
    _check_cluster(cluster)
    from quantkit.evaluate import gates, tasks

    limits = gates.profile(settings.profile)
    if settings.max_perplexity_drift is not None:
        limits = limits.model_copy(update={"perplexity_drift": settings.max_perplexity_drift})

    def make(work: Work, report: Report) -> None:
        from quantkit.evaluate import report as pages

        judged = [_candidate(path, candidates) for path in candidates]
        for each in judged:
            text.refuse_shared_text(each.calibrated_on, settings.text)
        work.results |= pages.evaluate(
            judged, reference, settings=settings, limits=limits,
            acceptance=_acceptance(draft, work.partial, report), seed=seed, note=note, out=work.out,
            folder=work.partial, device=device, report=report, hand_out=hand_out, cluster=cluster,
        )  # fmt: skip

    def verdict(manifest: Manifest) -> None:
        found = manifest.results
        if found["verdict"] == "passed":
            return
        said = "; ".join(gate["sentence"] for gate in found["gates"] if gate["verdict"] == found["verdict"])
        names = ", ".join(dict.fromkeys(gate["candidate"] for gate in found["gates"] if gate["verdict"] != "passed"))
        if found["verdict"] == "undecided":
            raise GateUndecided(f"{names} can not be judged yet: {said}. Raise evaluate.samples, or the limit")
        raise GateFailed(
            f"{names} must not be served: {said}. Raise bits or calibration samples, take a smaller group_size, or, if "
            "that is acceptable, another profile of limits or evaluate.max_perplexity_drift"
        )

    asked = tasks.resolve(settings.tasks) if settings.tasks else []
    shape = settings.model_dump() | {
        "text": text.describe(settings.text), "tasks": {each.name: each.digest for each in asked},
        "limits": limits.model_dump(), "seed": seed, "note": note,
    }  # fmt: skip
    inputs = {"candidate" if not number else f"candidate-{number + 1}": path for number, path in enumerate(candidates)}
    inputs |= {"reference": reference} | ({"draft": draft} if draft else {})
    return Stage("eval", "report", inputs, shape, make, verdict, look=lambda: _open(reference, *candidates))


def _candidate(path: Path, among: Sequence[Path]) -> "Candidate":
    """What is judged: called by its folder, and by those above it as far as needed to tell it from the others."""
    from quantkit.evaluate.report import Candidate

    manifest = artifacts.read_manifest(path)
    others = [each.resolve() for each in among if each.resolve() != path.resolve()]
    parts = path.resolve().parts
    deep = next(n for n in range(1, len(parts) + 1) if all(each.parts[-n:] != parts[-n:] for each in others))
    linears = [
        {"name": note["linear"], "relative_error": note["relative_error"]}
        for note in (manifest.results.get("linears", []) if manifest else [])
    ]
    return Candidate("/".join(parts[-deep:]), path, _calibration_of(path), linears)


def _acceptance(draft: Path | None, folder: Path, report: Report) -> "Acceptance":
    """Has vLLM count what it accepts of the draft before a candidate, on the draft's own held-out prompts."""
    if draft is None:
        return lambda session, candidate: None
    from quantkit import conversations
    from quantkit.checkpoint import open_checkpoint
    from quantkit.draft import acceptance, distil

    facts = (artifacts.read_manifest(draft) or _no_draft(draft)).results
    held_out = conversations.load_exchanges(draft / "held_out.jsonl")

    def measure(session: "Session", candidate: "Candidate") -> dict[str, Any]:
        place = folder / f"acceptance-{candidate.name.replace('/', '-')}"
        counted = acceptance.measure(
            session, distil.speaking_target(open_checkpoint(candidate.path), place), draft, held_out,
            k=facts["speculative_tokens"], longest=max(len(each.answer) for each in held_out), folder=place,
            report=report, what="the draft", method=facts["kind"],
        )  # fmt: skip
        return counted.summary()

    return measure


def _no_draft(path: Path) -> Manifest:
    raise QuantkitError(f"draft {path} has no manifest: give the --out of `quantkit train-draft`")


def train_draft(
    target: Path, *, settings: Draft, seed: int, cluster: str | None = None,
    hand_out: "ranks.HandOut" = lambda order: None,
) -> Stage:  # fmt: skip
    """A draft for the target, distilled on the target's own answers, and quantized where that makes it better.

    A head (kind eagle3) is another engine's work and stays in 16 bits. `hand_out` tells other processes to train along.
    With the address of a Ray cluster the target writes prompts and answers there; the name of the work does not say
    where it is done, so it goes on here, or there, when interrupted.

    Raises:
        QuantkitError: a head and several processes; a cluster, and no Ray here.
    """
    with_head = settings.kind == "eagle3"
    if with_head and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise QuantkitError("kind eagle3 is trained by one process: leave out torchrun")
    _check_cluster(cluster)

    def make(work: Work, report: Report) -> None:
        from quantkit import checkpoint as checkpoints
        from quantkit.draft import distil

        if with_head:
            from quantkit.engines import head

            head.layers_read(checkpoints.open_checkpoint(target).arch.num_layers)  # refuses what is too shallow

        def train_head(dense: Path, exchanges: Path, out: Path) -> dict[str, Any]:
            import torch

            from quantkit.engines import run

            return run.train_head(
                _HEAD_ENGINE, checkpoints.open_checkpoint(dense), exchanges, settings, seed=seed, out=out,
                device="cuda" if torch.cuda.is_available() else "cpu", folder=work.partial, report=report,
            )  # fmt: skip

        def quantize(draft: Path, out: Path, texts: Sequence[list[int]]) -> None:
            _quantize_draft(
                draft, out, texts, target, settings, seed=seed, hand_out=hand_out, folder=work.partial, report=report
            )

        work.results |= distil.train_draft(
            target, settings=settings, seed=seed, out=work.out, folder=work.partial, report=report,
            quantize=None if settings.quantize == "no" else quantize, train_head=train_head, hand_out=hand_out,
            cluster=cluster,
        )  # fmt: skip

    inputs = {"target": target} | ({"init": Path(settings.init)} if settings.init else {})
    shape = {"draft": settings.model_dump(), "prompts": text.describe([settings.prompts]), "seed": seed}
    if with_head:
        shape["pins"] = registry.digest(_HEAD_ENGINE)
    return Stage("train-draft", "draft", inputs, shape, make, look=lambda: _open(*inputs.values()))


def _open(*paths: Path, quantized: bool | None = None) -> None:
    """Raise what is wrong with checkpoints and their tokenizers; `quantized`: what they must be."""
    from quantkit import checkpoint as checkpoints
    from quantkit import tokens

    for path in paths:
        checkpoints.open_checkpoint(path, quantized=quantized)
        tokens.load_tokenizer(path)


def _check_cluster(cluster: str | None) -> None:
    if cluster is not None:
        vllm_environment.check_ray()


def _quantize_draft(
    draft: Path, out: Path, texts: Sequence[list[int]], target: Path, settings: Draft, *, seed: int,
    hand_out: "ranks.HandOut", folder: Path, report: Report,
) -> None:  # fmt: skip
    """The draft with 4-bit weights in groups as its target's, calibrated on what target and draft are asked and say."""
    from quantkit import checkpoint as checkpoints
    from quantkit import tokens
    from quantkit.quantize import stream

    assert settings.quantize != "no"
    source, storage = checkpoints.open_checkpoint(draft), checkpoints.open_checkpoint(target).storage
    sizes = [storage.group_size] if storage and storage.group_size > 0 else [128, 64, 32]
    inputs = [shape[1] for shape in architecture.linear_shapes(source.arch).values()]
    fitting = [size for size in [*sizes, 128, 64, 32] if all(width % size == 0 for width in inputs)]
    group_size = fitting[0] if fitting else -1
    windows = tokens.pack(texts, length=_DRAFT_WINDOW, samples=_DRAFT_WINDOWS)
    # a draft's cache is of its target's type, and has scales of its own
    kept: Literal["no", "fp8"] = "fp8" if has_kv_scheme(checkpoints.open_checkpoint(target).config) else "no"
    plan = _plan(Quantize(effort=settings.quantize, group_size=group_size, continuations=0, kv_cache=kept))
    layers, partial = folder / "draft-layers", out.with_suffix(".partial")

    def say(what: str, done: int, total: int) -> None:
        report(f"the draft: {what}", done, total)

    hand_out(stream.Order(source.path, windows, plan, layers))
    stream.quantize_layers(source, windows, plan, folder=layers, device="cpu", report=say)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    stream.write_checkpoint(source, plan, folder=layers, out=partial)
    partial.rename(out)


def bundle(
    target: Path, *, draft: Path | None, report_dir: Path | None, settings: Serve, bench_dir: Path | None = None
) -> Stage:
    """Target, draft and report as a directory that `vllm serve --config` serves.

    bench_dir: a bench of an earlier bundle of the same two, whose measurements take the place of the draft's plan.
    """

    def make(work: Work, report: Report) -> None:
        from quantkit import speculation
        from quantkit.capacity import sizing
        from quantkit.serve import bundle as bundles
        from quantkit.serve.settings import from_recipe

        report("writing the bundle", 0, 0)
        manifest = artifacts.read_manifest(draft) if draft else None
        raise_all(_of_others(target, draft, report_dir, decided=bench_dir is None and settings.speculate == "auto"))
        plans = speculation.read(manifest.results if manifest else {}) if draft else None
        if plans is not None and bench_dir is not None:
            plans |= _benched(bench_dir, target, draft)
        left = left_at_16_bits(report_dir, target)
        flags, sources, decisions = from_recipe(
            as_quantized(settings, target), target, plans=plans, left_at_16_bits=left,
            method=sizing.speculative_method(sizing.read_config(draft)) if draft else "draft_model",
        )  # fmt: skip
        bundles.build(
            work, target=target, draft=draft, report=report_dir, settings=flags, sources=sources, decisions=decisions
        )

    found = {"target": target, "draft": draft, "report": report_dir, "bench": bench_dir}
    inputs = {name: path for name, path in found.items() if path is not None}
    return Stage("bundle", "bundle", inputs, {"serve": settings.model_dump()}, make)


def _of_others(target: Path, draft: Path | None, report_dir: Path | None, *, decided: bool) -> list[str]:
    """What was measured on another target than this one, and would speak for it.

    decided: whether the draft's plan decides if the bundle speculates.
    """
    problems, digest = [], artifacts.digest(target)
    judged = artifacts.read_manifest(report_dir) if report_dir else None
    if judged is not None and digest not in judged.inputs.values():
        problems.append(
            f"report {report_dir} judges another checkpoint than {target}: run quantkit eval on it, or give no --report"
        )
    trained = artifacts.read_manifest(draft) if draft else None
    if trained is not None and decided and trained.inputs.get("target", digest) != digest:
        problems.append(
            f"draft {draft} was trained for another target than {target}, so its plan does not say if it pays here: "
            "run quantkit train-draft on this one, give a --bench of the two, or --speculate always or never"
        )
    return problems


def _benched(bench_dir: Path, target: Path, draft: Path | None) -> "dict[Profile, Plan]":
    """The plan that a bench of these very checkpoints measured.

    Raises:
        QuantkitError: the folder is no bench, or one of other checkpoints, or it measured no draft.
    """
    from quantkit import speculation

    manifest = artifacts.read_manifest(bench_dir)
    if manifest is None or manifest.kind != "bench":
        raise QuantkitError(f"{bench_dir} holds no bench: give the --out of quantkit bench")
    parts = {"target": target, "draft": draft}
    others = [
        f"the {name} that {bench_dir} measured is another one: run quantkit bench on a bundle of this {name}"
        for name, path in parts.items()
        if path is not None and manifest.results["digests"].get(name) != artifacts.digest(path)
    ]
    raise_all(others)
    plans = speculation.read(manifest.results)
    if not plans:
        raise QuantkitError(f"{bench_dir} measured no draft beside the same without one: bench w4 and w4+draft:4")
    return plans


def left_at_16_bits(report_dir: Path | None, target: Path) -> list[int]:
    """The layers whose KV cache the evaluation of this very target would leave at 16 bits."""
    manifest = artifacts.read_manifest(report_dir) if report_dir else None
    if manifest is None:
        return []
    digest = f"sha256:{artifacts.digest(target)}"
    judged = [
        each for each in manifest.results["candidates"] if each["digest"] == digest and each["kv_cache"] == "auto"
    ]
    cost = judged[0].get("cache") if judged else None
    return list(cost["leave_at_16_bits"]) if cost else []


def as_quantized(settings: Serve, target: Path) -> Serve:
    """A target that was quantized for an uncalibrated FP8 cache, knowingly, is served with one."""
    manifest = artifacts.read_manifest(target)
    kept = (manifest.results.get("kv_cache") if manifest else None) or {}
    if kept.get("calibrated", True) or settings.kv_cache_dtype != "auto":
        return settings
    return settings.model_copy(update={"kv_cache_dtype": kept["type"], "uncalibrated_kv_cache": True})


def serve_once(bundle_dir: Path) -> Stage:
    """The bundle served by the real vLLM on this machine and asked what was promised."""

    def make(work: Work, report: Report) -> None:
        from quantkit.serve import prove

        work.results |= prove.prove(bundle_dir, out=work.out, report=report)

    def verdict(manifest: Manifest) -> None:
        failed = [check for check in manifest.results["checks"] if not check["passed"]]
        if failed:
            lines = "; ".join(f"{check['name']}: {check['detail']}" for check in failed)
            raise QuantkitError(f"{bundle_dir} did not serve what it promises: {lines}")

    return Stage("serve", "served", {"bundle": bundle_dir}, {}, make, verdict)


def bench(bundle_dir: Path, baseline: Path, *, settings: Bench) -> Stage:
    """The bundle and the checkpoint that it was made from on the real vLLM, one technique at a time."""

    def make(work: Work, report: Report) -> None:
        from quantkit.bench import run

        work.results |= run.bench(bundle_dir, baseline, settings=settings, out=work.out, folder=work.partial,
                                  report=report)  # fmt: skip

    return Stage("bench", "bench", {"bundle": bundle_dir, "baseline": baseline}, {"bench": settings.model_dump()}, make)


def _windows(settings: TextWindows) -> dict[str, Any]:
    return {"text": text.describe(settings.text), "samples": settings.samples, "length": settings.length}


def _calibration_windows(
    calibration: TextWindows, checkpoint: Path, continuations: int, *, seed: int, folder: Path, report: Report,
    cluster: str | None,
) -> "TokenSet":  # fmt: skip
    """The windows to calibrate on: of the sources, with the chats of `self:N`, and what the model makes of them."""
    import torch

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
        windows = tokens.tokenize(
            calibration.text, tokens.load_tokenizer(checkpoint), samples=calibration.samples,
            length=calibration.length, seed=seed, written=written,
        )  # fmt: skip
        if not continuations:
            return windows
        more = conversations.continuations(
            session, checkpoint, windows, continuations, seed=seed, folder=folder, report=report
        )
    return windows._replace(input_ids_ST=torch.cat([windows.input_ids_ST, more.input_ids_ST]))


def _calibration_of(candidate: Path) -> list[str]:
    """The text sources that a quantized checkpoint's manifest says it was calibrated on."""
    manifest = artifacts.read_manifest(candidate)
    settings: Mapping[str, Any] = manifest.settings if manifest else {}
    return list(settings.get("calibration", {}).get("text", {}))
