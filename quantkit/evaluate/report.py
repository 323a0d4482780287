"""One evaluation: the reference and its candidates over the same tokens, the gates, and the report of it."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit import __version__, artifacts, conversations, provenance, tokens, vllm_environment
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.evaluate import cache, divergence, gates, measures, page, pair, perplexity, served, tasks, windows
from quantkit.evaluate.divergence import States
from quantkit.evaluate.windows import Windows
from quantkit.offline import Session
from quantkit.progress import LINE, Report
from quantkit.ranks import HandOut
from quantkit.recipe import Evaluate, Limits

_KEPT = 8  # of a reference's passes, the latest
_AUTO_CHATS = "self:32"


class Candidate(NamedTuple):
    """A checkpoint to judge, and what is known of it from elsewhere."""

    name: str
    path: Path
    calibrated_on: list[str]
    linears: list[dict[str, Any]]  # of its manifest: name, relative_error


Acceptance = Callable[[Session, Candidate], dict[str, Any] | None]  # of a draft before the candidate


def evaluate(
    candidates: Sequence[Candidate], reference_path: Path, *, settings: Evaluate, limits: Limits,
    acceptance: Acceptance, seed: int, note: str, out: Path, folder: Path, device: str, report: Report,
    hand_out: HandOut, cluster: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Score the candidates against the reference, write report.json, report.html and report.md, return the numbers.

    hand_out: tells the processes that torchrun started beside this one to read and score along.
    cluster: address of a Ray cluster on which vLLM answers and reads, instead of here.

    Raises:
        QuantkitError: candidate and reference do not belong together, or the text is too short or was calibrated on.
    """
    begin_s = time.monotonic()
    reference = open_checkpoint(reference_path, quantized=False)
    opened = {each.name: open_checkpoint(each.path) for each in candidates}
    digests = {each.path: artifacts.digest(each.path) for each in (reference, *opened.values())}  # once: bytes are read
    for candidate in opened.values():
        pair.check(reference, candidate, base=digests[reference.path])
    if settings.served or settings.tasks:
        served.check_cache(settings.kv_cache)
    tokenizer = tokens.load_tokenizer(reference_path)
    with Session(cluster=cluster) as session:
        sets, left_out = _sets(reference, tokenizer, session, settings, seed=seed, folder=folder, report=report)
        for each in candidates:
            pair.refuse_leak(each.calibrated_on, sets["text"], tokenizer)
        scorer = _Scorer(reference, digests[reference.path], sets, settings, session, folder, device, report,
                         hand_out)  # fmt: skip
        found = []
        for each in candidates:
            checkpoint = opened[each.name]
            known = _identity(checkpoint, reference, digests[checkpoint.path]) | {
                "name": each.name, "path": str(each.path), "linears": each.linears, "tasks": [],
                "acceptance": acceptance(session, each),
            }  # fmt: skip
            found += [known | scorer.judge(checkpoint, each.name, kept) for kept in settings.kv_cache]
    if settings.tasks:
        answered = tasks.run(
            reference_path, {str(number): Path(one["path"]) for number, one in enumerate(found)}, settings.tasks,
            folder=folder / "tasks", limit=settings.task_limit, seed=seed, report=report,
            kv_caches={str(number): one["kv_cache"] for number, one in enumerate(found)},
        )  # fmt: skip
        found = [one | {"tasks": answered[str(number)]} for number, one in enumerate(found)]
    verdicts = [gate for one in found for gate in gates.judge(one, limits)]
    results: dict[str, Any] = {
        "verdict": gates.overall(verdicts),
        "profile": settings.profile,
        "gates": [gate.summary() for gate in verdicts],
        "note": " ".join(part for part in (note, left_out) if part),
        "reference": _identity(reference, reference, digests[reference.path]),
        "sets": {name: _told(each, settings, name) for name, each in sets.items()},
        "candidates": found,
        "made": {
            "command": provenance.command(), "quantkit": __version__, "device": device, "seed": seed,
            "machine": str(provenance.machine()["processor"]), "date": datetime.now(UTC).date().isoformat(),
            "seconds": round(time.monotonic() - begin_s, 1),
        },
    }  # fmt: skip
    artifacts.write_json(out / "report.json", results)
    as_read: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    artifacts.write_text(out / "report.html", page.html(as_read))
    artifacts.write_text(out / "report.md", page.markdown(as_read))
    return as_read


def _sets(
    reference: Checkpoint, tokenizer: Any, session: Session, settings: Evaluate, *, seed: int, folder: Path,
    report: Report,
) -> tuple[dict[str, Windows], str]:  # fmt: skip
    """The windows of each set of text, and what is said where one was left out."""
    if settings.samples == "all":
        stride = settings.stride or settings.length
        found = {"text": windows.of_documents(settings.text, tokenizer, length=settings.length, stride=stride)}
    else:
        drawn = tokens.tokenize(settings.text, tokenizer, samples=settings.samples, length=settings.length, seed=seed)
        found = {"text": windows.of_passages(drawn)}
    if settings.long_length is not None:
        drawn = tokens.tokenize(
            settings.text, tokenizer, samples=settings.long_samples, length=settings.long_length, seed=seed
        )
        found["long text"] = windows.of_passages(drawn)
    source = None if settings.chat == "no" else settings.chat
    left_out = ""
    if source == "auto":
        lacks = (
            "the reference has no chat template" if not getattr(tokenizer, "chat_template", None)
            else "vLLM is not installed" if vllm_environment.distribution() is None else None
        )  # fmt: skip
        source = None if lacks else _AUTO_CHATS
        left_out = f"Chat was not scored: {lacks}." if lacks else ""
    if left_out:
        report(left_out, 0, LINE)
    if source is not None:
        speaks = folder / "chat"
        asked = conversations.prompts(
            session, source, reference.path, purpose=conversations.Purpose.EVALUATION, longest=settings.chat_tokens,
            seed=seed, folder=speaks, report=report, held_out=0,
        )  # fmt: skip
        said = conversations.answers(
            session, reference.path, asked, longest=settings.chat_tokens, seed=seed, folder=speaks / "answers",
            report=report, temperatures=(1.0,), what="the reference answers",
        )  # fmt: skip
        found["chat"] = windows.of_exchanges(said)
    return found, left_out


class _Scorer:
    """What the reference made of the windows, read once, and each candidate beside it."""

    def __init__(
        self, reference: Checkpoint, digest: str, sets: Mapping[str, Windows], settings: Evaluate, session: Session,
        folder: Path, device: str, report: Report, hand_out: HandOut,
    ) -> None:  # fmt: skip
        self.hand_out = hand_out
        self.reference, self.sets, self.settings = reference, sets, settings
        self.session, self.folder, self.device, self.report = session, folder, device, report
        kept = artifacts.cache("evaluate")
        self.states = {}
        for name, each in sets.items():
            path = kept / f"{divergence.name_of(digest, each, device)}.safetensors"
            self.states[name] = self._read(reference, name, path, "the reference")
        _forget_old(kept)
        self.served: dict[str, Tensor] = {}
        if settings.served:
            self.served = {name: self._nll(reference, name, "auto", "reference") for name in sets}

    def _read(self, checkpoint: Checkpoint, name: str, path: Path, who: str, kept: str = cache.PLAIN) -> States:
        what = f"{who} reads {name}{'' if kept == cache.PLAIN else f', {kept} KV cache'}, layer"
        return divergence.read(
            checkpoint, self.sets[name], path, device=self.device, what=what, report=self.report,
            cache=cache.reader(checkpoint, kept), hand_out=self.hand_out,
        )  # fmt: skip

    def _candidate(self, candidate: Checkpoint, kind: str, name: str, kept: str) -> States:
        """The candidate's states of a set, with a cache of that type; they are computed once."""
        path = self.folder / f"{name.replace('/', '-')}-{kept}-{kind}.safetensors"
        return self._read(candidate, kind, path, name, kept)

    def _nll(self, checkpoint: Checkpoint, name: str, kept: str, who: str) -> Tensor:
        return served.nll(
            self.session, checkpoint.path, self.sets[name], context=checkpoint.config.get("max_position_embeddings"),
            kv_cache=kept, folder=self.folder / "served" / f"{who.replace('/', '-')}-{kept}-{name}", report=self.report,
            what=f"vLLM reads {name} ({who}), window",
        )  # fmt: skip

    def judge(self, candidate: Checkpoint, name: str, kept: str) -> dict[str, Any]:
        """The candidate's part of the report, its KV cache kept in the type of that name."""
        on: dict[str, Any] = {}
        through: dict[str, Any] = {}
        layers: list[float] = []
        real = cache.resolved(candidate, kept)
        unasked = served.not_kept(real) if self.settings.served else None
        read = {kind: self._candidate(candidate, kind, name, real) for kind in self.sets}
        for kind, each in self.sets.items():
            states = (self.states[kind], read[kind])
            scores = divergence.compare(
                self.reference, candidate, states, each, device=self.device, report=self.report, hand_out=self.hand_out
            )
            layers = layers or divergence.by_layer(*states)
            on[kind] = measures.summarize(scores)
            if self.settings.served and not unasked:
                nll = self._nll(candidate, kind, kept, name)
                through[kind] = {
                    "perplexity": perplexity.perplexity(nll), "sequences": on[kind]["sequences"],
                    "drift": perplexity.drift(self.served[kind], nll, scores.sequence_N).summary(),
                    "gap_nats": perplexity.mean(nll - scores.candidate_nll_N, scores.sequence_N).summary(),
                }  # fmt: skip
        return {
            "kv_cache": kept, "on": on, "by_layer": layers, "served": through or None, "not_served": unasked,
            "cache": self._cost(candidate, name, real, read) if cache.reader(candidate, real) else None,
        }  # fmt: skip

    def _cost(self, candidate: Checkpoint, name: str, kept: str, read: Mapping[str, States]) -> dict[str, Any]:
        """What the cache adds to what the weights cost."""
        plain = {kind: self._candidate(candidate, kind, name, cache.PLAIN) for kind in self.sets}
        scores = divergence.compare(
            self.reference, candidate, (self.states["text"], plain["text"]), self.sets["text"], device=self.device,
            report=self.report, hand_out=self.hand_out,
        )  # fmt: skip
        return cache.cost(
            candidate, kept, {kind: (plain[kind], read[kind]) for kind in self.sets}, self.sets,
            weights_kl=float(scores.kl_N.double().mean()), folder=self.folder, device=self.device, report=self.report,
            hand_out=self.hand_out,
        )  # fmt: skip


def _identity(checkpoint: Checkpoint, reference: Checkpoint, digest: str) -> dict[str, Any]:
    size = sum(shard.stat().st_size for shard in set(checkpoint.shards.values()))
    weights = sum(torch.Size(entry.shape).numel() for entry in reference.dense_entries(dtype=torch.float16))
    return {
        "name": checkpoint.path.name, "digest": f"sha256:{digest}", "bytes": size,
        "bits_per_weight": round(8 * size / weights, 3),
    }  # fmt: skip


def _told(each: Windows, settings: Evaluate, name: str) -> dict[str, Any]:
    sources = list(settings.text) if name != "chat" else ["answers that the reference wrote at temperature 1"]
    return {
        "sources": sources, "sequences": len(each.sequence_S.unique()), "scored_tokens": int(each.scored_ST.sum()),
        "window_tokens": each.input_ids_ST.shape[1], "stride": each.stride, "adds_bos": each.adds_bos,
    }  # fmt: skip


def _forget_old(cache: Path) -> None:
    """Keep a reference's latest passes only: each is as large as the text in the model's hidden size."""
    kept = sorted(cache.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[_KEPT:]:
        path.unlink(missing_ok=True)
