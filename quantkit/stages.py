"""What flows: each stage as a function from directories to a directory, with what its manifest will say."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantkit import __version__, architecture, artifacts, hardware, text
from quantkit.artifacts import Kind, Manifest, Work
from quantkit.engines import registry
from quantkit.errors import GateFailed, QuantkitError, raise_all
from quantkit.formats import Storage
from quantkit.progress import LINE, Display, Report
from quantkit.recipe import Draft, Evaluate, Quantize, Serve, TextWindows

if TYPE_CHECKING:
    from quantkit import ranks
    from quantkit.checkpoint import Checkpoint
    from quantkit.quantize.layer import Settings
    from quantkit.tokens import TokenSet

# What every engine takes, each within its limits.
_FOR_ALL = {"engine", "engine_options", "method", "format", "bits", "group_size", "symmetric"}
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
    else:
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
    memory_budget: int | None = None, hand_out: "ranks.HandOut" = lambda order: None,
) -> Stage:  # fmt: skip
    """FP16 checkpoint -> 4-bit checkpoint that vLLM loads, by the native engine or another one.

    The native engine goes on where an interrupted run stopped; any other begins again. `hand_out` tells other processes
    to help.

    Raises:
        QuantkitError: everything that the settings ask for and the engine does not do.
    """
    raise_all(engine_problems(settings, memory_budget=memory_budget))
    native = settings.engine == "native"

    def make(work: Work, report: Report) -> None:
        from quantkit import checkpoint as checkpoints

        source = checkpoints.open_checkpoint(checkpoint, quantized=False)
        for limit in _limits(source, settings):
            report(limit, 0, LINE)

        def windows(continuations: int = 0) -> "TokenSet":
            return _calibration_windows(
                calibration, checkpoint, continuations, seed=seed, folder=work.partial, report=report
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
    return Stage("quantize", "quantized", {"checkpoint": checkpoint}, shape, make)


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
    from quantkit.quantize.layer import Settings

    native = settings.model_dump(exclude={"engine", "engine_options", "format"})
    return Settings.of(**native, format=settings.format or "compressed-tensors")


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
    from quantkit.quantize import estimate, stream

    begin_s, plan = time.monotonic(), _plan(settings)
    hardware.keep_freed_memory()
    compute = hardware.compute_dtype(device)
    needed = estimate.need(
        source.arch, plan, samples=calibration.samples * (1 + plan.continuations), length=calibration.length,
        compute_bytes=compute.itemsize, speed=estimate.speed(device, compute),
    )  # fmt: skip
    report(f"needs about {needed}", 0, LINE)
    estimate.check_room(needed, work.out, memory_budget=memory_budget)
    windows = read(plan.continuations)
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
        "continuations": plan.continuations,
        "estimated": needed._asdict(),
        "method": plan.method,
        "drift_correction": plan.drift_correction,
        "output_curvature": plan.output_curvature,
        "shrinkage": plan.shrinkage,
        "allocation": stream.allocation(layers),
        "special": {name: storage and storage._asdict() for name, storage in special.items()},  # null: 16 bits
        "linears": [note._asdict() for note in notes],
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
    return {"engine": ran, "method": ran["method"], **_counted(windows), "linears": []}


def _counted(windows: "TokenSet") -> dict[str, Any]:
    return {"calibration_tokens": windows.input_ids_ST.numel(), "adds_bos": windows.adds_bos}


def evaluate(
    candidate: Path, reference: Path, *, settings: Evaluate, seed: int, note: str = "", device: str = "cpu"
) -> Stage:
    """Candidate against reference on held-out text; the verdict stops the run when the gate fails."""

    def make(work: Work, report: Report) -> None:
        from quantkit.evaluate import report as pages

        calibrated = _calibration_of(candidate)
        text.refuse_shared_text(calibrated, settings.text)
        work.results |= pages.evaluate(
            candidate, reference, settings=settings, seed=seed, calibrated_on=calibrated, note=note, out=work.out,
            folder=work.partial, device=device, report=report,
        )  # fmt: skip

    def verdict(manifest: Manifest) -> None:
        failed = [gate["sentence"] for gate in manifest.results["gates"] if not gate["passed"]]
        if failed:
            raise GateFailed(
                f"{candidate} must not be served: {'; '.join(failed)}. Raise bits or calibration samples, take a "
                "smaller group_size, or, if that drift is acceptable, set evaluate.max_perplexity_drift"
            )

    shape = _windows(settings) | {"max_perplexity_drift": settings.max_perplexity_drift, "seed": seed, "note": note}
    return Stage("eval", "report", {"candidate": candidate, "reference": reference}, shape, make, verdict)


def train_draft(target: Path, *, settings: Draft, seed: int, hand_out: "ranks.HandOut" = lambda order: None) -> Stage:
    """A draft for the target, distilled on the target's own answers, and quantized where that makes it better.

    A head (kind eagle3) is another engine's work and stays in 16 bits. `hand_out` tells other processes to train along.

    Raises:
        QuantkitError: a head and several processes.
    """
    with_head = settings.kind == "eagle3"
    if with_head and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise QuantkitError("kind eagle3 is trained by one process: leave out torchrun")

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
        )  # fmt: skip

    inputs = {"target": target} | ({"init": Path(settings.init)} if settings.init else {})
    shape = {"draft": settings.model_dump(), "prompts": text.describe([settings.prompts]), "seed": seed}
    if with_head:
        shape["pins"] = registry.digest(_HEAD_ENGINE)
    return Stage("train-draft", "draft", inputs, shape, make)


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
    plan = _plan(Quantize(effort=settings.quantize, group_size=group_size, continuations=0))
    layers, partial = folder / "draft-layers", out.with_suffix(".partial")

    def say(what: str, done: int, total: int) -> None:
        report(f"the draft: {what}", done, total)

    hand_out(stream.Order(source.path, windows, plan, layers))
    stream.quantize_layers(source, windows, plan, folder=layers, device="cpu", report=say)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    stream.write_checkpoint(source, plan, folder=layers, out=partial)
    partial.rename(out)


def bundle(target: Path, *, draft: Path | None, report_dir: Path | None, settings: Serve) -> Stage:
    """Target, draft and report as a directory that `vllm serve --config` serves."""

    def make(work: Work, report: Report) -> None:
        from quantkit import speculation
        from quantkit.serve import bundle as bundles
        from quantkit.serve.settings import from_recipe

        report("writing the bundle", 0, 0)
        manifest = artifacts.read_manifest(draft) if draft else None
        plans = speculation.read(manifest.results if manifest else {}) if draft else None
        flags, sources, decisions = from_recipe(settings, target, plans=plans)
        bundles.build(
            work, target=target, draft=draft, report=report_dir, settings=flags, sources=sources, decisions=decisions
        )

    inputs = {"target": target} | ({"draft": draft} if draft else {}) | ({"report": report_dir} if report_dir else {})
    return Stage("bundle", "bundle", inputs, {"serve": settings.model_dump()}, make)


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


def _windows(settings: TextWindows) -> dict[str, Any]:
    return {"text": text.describe(settings.text), "samples": settings.samples, "length": settings.length}


def _calibration_windows(
    calibration: TextWindows, checkpoint: Path, continuations: int, *, seed: int, folder: Path, report: Report
) -> "TokenSet":
    """The windows to calibrate on: of the sources, with the chats of `self:N`, and what the model makes of them."""
    import torch

    from quantkit import conversations, tokens
    from quantkit.offline import Session

    written: dict[str, Sequence[text.Document]] = {}
    with Session() as session:  # which starts vLLM when it is asked for something
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
