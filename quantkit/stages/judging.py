"""Candidates against the checkpoint that they were made from, and the verdict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import artifacts, text
from quantkit.artifacts import Manifest, Work
from quantkit.errors import GateFailed, GateUndecided, QuantkitError
from quantkit.progress import Report
from quantkit.recipe import Evaluate
from quantkit.stages.stage import Stage, check_cluster, open_inputs

if TYPE_CHECKING:
    from quantkit import ranks
    from quantkit.evaluate.report import Acceptance, Candidate
    from quantkit.offline import Session


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
    check_cluster(cluster)
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
    return Stage("eval", "report", inputs, shape, make, verdict, look=lambda: open_inputs(reference, *candidates))


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


def _calibration_of(candidate: Path) -> list[str]:
    """The text sources that a quantized checkpoint's manifest says it was calibrated on."""
    manifest = artifacts.read_manifest(candidate)
    settings: Mapping[str, Any] = manifest.settings if manifest else {}
    return list(settings.get("calibration", {}).get("text", {}))


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
