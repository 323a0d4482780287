"""Target, draft and evidence as a directory that is served, and what speaks for it."""

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit import artifacts
from quantkit.artifacts import Work
from quantkit.errors import QuantkitError, raise_all
from quantkit.progress import Report
from quantkit.recipe import Serve
from quantkit.stages.stage import Stage

if TYPE_CHECKING:
    from quantkit.speculation import Plan, Profile


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
