"""What flows: each stage as a function from directories to a directory, with what its manifest will say."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import artifacts, hardware, text
from quantkit.artifacts import Kind, Manifest, Work
from quantkit.errors import GateFailed, QuantkitError
from quantkit.progress import LINE, Display, Report
from quantkit.recipe import Draft, Evaluate, Quantize, Serve, TextWindows


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
    memory_budget: int | None = None, hand_out: Callable[[object], None] = lambda order: None,
) -> Stage:  # fmt: skip
    """FP16 checkpoint -> 4-bit checkpoint that vLLM loads. `hand_out` tells other processes to help."""

    def make(work: Work, report: Report) -> None:
        from quantkit import checkpoint as checkpoints
        from quantkit import tokens
        from quantkit.quantize import estimate, stream
        from quantkit.quantize.layer import Settings

        source = checkpoints.open_checkpoint(checkpoint, quantized=False)
        plan = Settings.of(**settings.model_dump())
        for limit in stream.check_settings(source, plan):
            report(limit, 0, LINE)
        windows = tokens.tokenize(
            calibration.text, tokens.load_tokenizer(checkpoint), samples=calibration.samples,
            length=calibration.length, seed=seed,
            written=_written(calibration, checkpoint, seed=seed, folder=work.partial, report=report),
        )  # fmt: skip
        hardware.keep_freed_memory()
        compute = hardware.compute_dtype(device)
        shape_ST = tuple(windows.input_ids_ST.shape)
        needed = estimate.need(
            source.arch, plan, samples=shape_ST[0], length=shape_ST[1], compute_bytes=compute.itemsize,
            speed=estimate.speed(device, compute),
        )  # fmt: skip
        report(f"needs about {needed}", 0, LINE)
        estimate.check_room(needed, work.out, memory_budget=memory_budget)
        checkpoints.check_finite(source, lambda done, total: report("checking the weights, tensor", done, total))
        layers = work.partial / "layers"
        hand_out(stream.Order(source.path, windows, plan, layers, seed))
        notes = stream.quantize_layers(source, windows, plan, folder=layers, device=device, report=report)
        tuned = stream.tune_scales(source, windows, plan, folder=layers, seed=seed, device=device, report=report)
        special = stream.storages(source.arch, stream.settled(plan, layers)).special
        report("writing", 0, 0)
        hardware.give_back_freed_memory()  # embedding and head are read whole, and would come on top
        stream.write_checkpoint(source, plan, folder=layers, out=work.out)
        checkpoints.open_checkpoint(work.out, quantized=True)
        work.results |= {
            "calibration_tokens": windows.input_ids_ST.numel(),
            "adds_bos": windows.adds_bos,
            "weights_bytes": sum(file.stat().st_size for file in work.out.glob("*.safetensors")),
            "source_weights_bytes": sum(file.stat().st_size for file in set(source.shards.values())),
            "device": device,
            "estimated": needed._asdict(),
            "method": plan.method,
            "drift_correction": plan.drift_correction,
            "output_curvature": plan.output_curvature,
            "shrinkage": plan.shrinkage,
            "tuning_kl_nats": [round(kl, 6) for kl in tuned],
            "allocation": stream.allocation(layers),
            "special": {name: storage and storage._asdict() for name, storage in special.items()},  # null: 16 bits
            "linears": [note._asdict() for note in notes],
        }

    shape = {"quantize": settings.model_dump(), "calibration": _windows(calibration), "seed": seed}
    return Stage("quantize", "quantized", {"checkpoint": checkpoint}, shape, make)


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


def train_draft(target: Path, *, settings: Draft, seed: int) -> Stage:
    """A draft for the target, distilled on the target's own answers."""

    def make(work: Work, report: Report) -> None:
        from quantkit.draft import distil

        work.results |= distil.train_draft(
            target, settings=settings, seed=seed, out=work.out, folder=work.partial, report=report
        )

    inputs = {"target": target} | ({"init": Path(settings.init)} if settings.init else {})
    shape = {"draft": settings.model_dump(), "prompts": text.describe([settings.prompts]), "seed": seed}
    return Stage("train-draft", "draft", inputs, shape, make)


def bundle(target: Path, *, draft: Path | None, report_dir: Path | None, settings: Serve) -> Stage:
    """Target, draft and report as a directory that `vllm serve --config` serves."""

    def make(work: Work, report: Report) -> None:
        from quantkit.serve import bundle as bundles
        from quantkit.serve.settings import from_recipe

        report("writing the bundle", 0, 0)
        flags, sources = from_recipe(settings, target, has_draft=draft is not None)
        bundles.build(work, target=target, draft=draft, report=report_dir, settings=flags, sources=sources)

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


def _written(
    calibration: TextWindows, checkpoint: Path, *, seed: int, folder: Path, report: Report
) -> dict[str, Sequence[text.Document]]:
    """The chats that the model writes for the calibration sources `self:N`."""
    found: dict[str, Sequence[text.Document]] = {}
    for source in calibration.text:
        count = text.self_prompts(source)
        if count is not None:
            from quantkit import conversations
            from quantkit.offline import Session

            with Session() as session:
                found[source] = conversations.chats(
                    session, checkpoint, count, prompt_tokens=128, answer_tokens=256, temperature=1.0, seed=seed,
                    folder=folder, report=report,
                )  # fmt: skip
    return found


def _calibration_of(candidate: Path) -> list[str]:
    """The text sources that a quantized checkpoint's manifest says it was calibrated on."""
    manifest = artifacts.read_manifest(candidate)
    settings: Mapping[str, Any] = manifest.settings if manifest else {}
    return list(settings.get("calibration", {}).get("text", {}))
