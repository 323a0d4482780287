"""The evaluation as numbers (report.json) and as a page that people look at (report.html)."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit import artifacts, tokens
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.errors import QuantkitError
from quantkit.evaluate import divergence, perplexity
from quantkit.evaluate.gates import Gate
from quantkit.progress import Report
from quantkit.recipe import Evaluate

_BATCH = 2  # windows a forward pass
_SHARED = 0.01  # of the held-out text's 32-token runs may also stand in the calibration text by chance


def evaluate(
    candidate_path: Path, reference_path: Path, *, settings: Evaluate, seed: int, calibrated_on: Sequence[str],
    note: str, out: Path, folder: Path, device: str, report: Report,
) -> dict[str, Any]:  # fmt: skip
    """Score the candidate against the reference, write report.json and report.html into `out`, return the numbers.

    Raises:
        QuantkitError: candidate and reference do not belong together, or the text is too short or was calibrated on.
    """
    reference = open_checkpoint(reference_path, quantized=False)
    candidate = open_checkpoint(candidate_path)
    _check_pair(reference, candidate)
    tokenizer = tokens.load_tokenizer(reference_path)
    windows = tokens.tokenize(settings.text, tokenizer, samples=settings.samples, length=settings.length, seed=seed)
    _refuse_leak(calibrated_on, windows, tokenizer, seed)
    scores = divergence.compare(
        reference, candidate, windows, device=device, batch_size=_BATCH, folder=folder, report=report
    )
    results = summarize(scores, settings.max_perplexity_drift) | {
        "text": list(settings.text), "window_tokens": settings.length, "adds_bos": windows.adds_bos, "note": note,
        "candidate": str(candidate_path.name), "reference": str(reference_path.name),
    }  # fmt: skip
    artifacts.write_json(out / "report.json", results)
    artifacts.write_text(out / "report.html", page(results, scores))
    return results


def summarize(scores: divergence.Scores, max_perplexity_drift: float) -> dict[str, Any]:
    """The numbers of a report, with their standard errors over sequences, and the gates' verdicts."""
    found = perplexity.drift(scores.reference_nll_ST, scores.candidate_nll_ST)
    kl, kl_error = perplexity.mean_and_error(scores.kl_ST)
    agreement, agreement_error = perplexity.mean_and_error(scores.same_top1_ST.double())
    gates = [Gate("perplexity drift", found.drift, max_perplexity_drift)]
    return {
        "perplexity": {"reference": found.reference, "candidate": found.candidate},
        "drift": {"value": found.drift, "standard_error": found.drift_standard_error},
        "kl_nats": {
            "mean": kl, "standard_error": kl_error,
            "median": float(scores.kl_ST.double().median()), "p99": float(scores.kl_ST.double().quantile(0.99)),
        },
        "top1_agreement": {"value": agreement, "standard_error": agreement_error},
        "scored_tokens": found.scored_tokens,
        "sequences": found.sequences,
        "gates": [
            {"name": g.name, "value": g.value, "limit": g.limit, "passed": g.passed, "sentence": g.sentence()}
            for g in gates
        ],
    }  # fmt: skip


def _check_pair(reference: Checkpoint, candidate: Checkpoint) -> None:
    if reference.arch._replace(tied_embeddings=True) != candidate.arch._replace(tied_embeddings=True):
        raise QuantkitError(
            f"{candidate.path} was not made from {reference.path}: their configs differ in size or kind; "
            "give the checkpoint that was quantized as --reference"
        )


def _refuse_leak(calibrated_on: Sequence[str], windows: tokens.TokenSet, tokenizer: Any, seed: int) -> None:
    """Refuse held-out text whose words, not only whose name, were calibrated on."""
    for source in calibrated_on:
        if source.startswith(("hf:", "self:")):
            continue  # known by name; reading the whole of it again would cost more than the evaluation
        shared = tokens.shared_spans(tokens.whole(source, tokenizer), windows)
        if shared > _SHARED:
            raise QuantkitError(
                f"{shared:.0%} of the held-out text also stands in the calibration text {source!r}: "
                "the drift would be flattered; evaluate on another text"
            )


def page(results: Mapping[str, Any], scores: divergence.Scores) -> str:
    """The report as one self-contained HTML page."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("quantkit.evaluate", "."), autoescape=select_autoescape())
    return environment.get_template("report.html.j2").render(r=results, plot=_plot(scores))


def _plot(scores: divergence.Scores) -> str:
    """Two pictures side by side as inline SVG: drift of each sequence, KL by position."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    drifts = ((scores.candidate_nll_ST - scores.reference_nll_ST).double().mean(-1).exp() - 1) * 100
    kl_T = scores.kl_ST.double().mean(0)
    bins = [part.mean() for part in torch.tensor_split(kl_T, min(32, len(kl_T)))]
    edges = [int(part[0]) for part in torch.tensor_split(torch.arange(1, len(kl_T) + 1), len(bins))]
    with pyplot.rc_context({"svg.hashsalt": "quantkit", "svg.fonttype": "none", "font.size": 9}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
        left.bar(range(1, len(drifts) + 1), sorted(drifts.tolist()), color="#3b6ea5")
        left.set(xlabel="held-out sequence, sorted", ylabel="perplexity drift, %")
        right.plot(edges, bins, color="#a5513b")
        right.set(xlabel="position in the window, tokens", ylabel="KL(FP16 || quantized), nats", ylim=(0, None))
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
