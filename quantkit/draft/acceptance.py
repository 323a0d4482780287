"""How many of a draft's tokens the target accepts: from logits, along the target's text, and by vLLM's own counters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantkit import offline
from quantkit.conversations import Exchange, stop_tokens
from quantkit.offline import Session
from quantkit.progress import Report


class Acceptance(NamedTuple):
    """Counts, or expected counts, over many drafts of `k` tokens each.

    error: of the accepted length, one standard error over the texts; 0 where nothing is known of single texts.
    """

    drafts: float
    proposed: float
    accepted: float
    per_position: list[float]  # accepted at draft position 0, 1, ...
    error: float = 0.0

    @property
    def rate(self) -> float:
        """Accepted / proposed."""
        return self.accepted / max(self.proposed, 1)

    @property
    def length(self) -> float:
        """Accepted length: tokens a step of the target, 1 + accepted / drafts."""
        return 1 + self.accepted / max(self.drafts, 1)

    def summary(self) -> dict[str, float | list[float]]:
        """For manifests and reports."""
        return {
            "acceptance_rate": round(self.rate, 4),
            "accepted_length": round(self.length, 4),
            "accepted_length_error": round(self.error, 4),
            "per_position": [round(count / max(self.drafts, 1), 4) for count in self.per_position],
            "drafts": round(self.drafts, 2),
            "proposed": round(self.proposed, 2),
            "accepted": round(self.accepted, 2),
        }


class Offline(NamedTuple):
    """What a draft's logits say of its acceptance at one temperature, without an engine.

    greedy: the draft proposes its most likely token, as vLLM's default is at every temperature.
    sampled: the draft proposes a token drawn at that temperature; the same as `greedy` at temperature 0.
    overlap: mean over positions of sum min(p, q); at 0 of whether both have the same most likely token.
    top: mean over positions of p at the draft's most likely token; at 0 the same as `overlap`.
    positions: how many there are.
    """

    greedy: Acceptance
    sampled: Acceptance
    overlap: float
    top: float
    positions: int

    def summary(self) -> dict[str, object]:
        """For manifests and reports."""
        return {
            "greedy": self.greedy.summary(), "sampled": self.sampled.summary(),
            "overlap": round(self.overlap, 4), "top": round(self.top, 4),
        }  # fmt: skip


def simulate(chances: Sequence[float], k: int) -> Acceptance:
    """Speculation of `k` tokens along a target's text: the expected counts, exactly.

    chances[t]: how likely the proposal for token t is accepted, given the text. What comes out of speculation is
        distributed as the target's own text (arXiv 2211.17192, appendix A.1), so a text of the target's is as good as
        any; and given what came out, one position's acceptance says nothing of another's. At 0 and 1 these are counts.
    """
    begins = [1.0] + [0.0] * (len(chances) + k)  # how likely a step begins at a token
    drafts, per_position = 0.0, [0.0] * k
    for position in range(len(chances)):
        reached = begins[position]
        if not reached:
            continue
        drafts += reached
        for step in range(k):
            chance = chances[position + step] if position + step < len(chances) else 0.0
            begins[position + step + 1] += reached * (1 - chance)  # the target's own token follows
            reached *= chance
            per_position[step] += reached
        begins[position + k + 1 if position + k < len(chances) else len(chances)] += reached
    return Acceptance(drafts, drafts * k, sum(per_position), per_position)


def total(parts: Sequence[Acceptance]) -> Acceptance:
    """The counts of several texts together, with the error that their spread gives (of a ratio of sums)."""
    drafts, accepted = sum(part.drafts for part in parts), sum(part.accepted for part in parts)
    error = 0.0
    if len(parts) > 1 and drafts:
        gaps = [part.accepted - accepted / drafts * part.drafts for part in parts]
        error = (len(parts) / (len(parts) - 1) * sum(gap**2 for gap in gaps)) ** 0.5 / drafts
    positions = zip(*(part.per_position for part in parts), strict=True)
    return Acceptance(
        drafts, sum(part.proposed for part in parts), accepted, [sum(column) for column in positions], error
    )


def together(parts: Sequence[Offline]) -> Offline:
    """What the logits say of several texts."""
    positions = sum(part.positions for part in parts)
    overlap, top = (
        sum(getattr(part, name) * part.positions for part in parts) / positions for name in ("overlap", "top")
    )
    greedy, sampled = total([part.greedy for part in parts]), total([part.sampled for part in parts])
    return Offline(greedy, sampled, overlap, top, positions)


def gain(parts: Sequence[Acceptance], over: Sequence[Acceptance]) -> tuple[float, float]:
    """How much longer the accepted length is than another draft's on the same texts, and its error.

    The error is of the difference, text by text: what makes a text easy for both drafts is no part of it. Either length
    is a ratio of sums, and a text's share in it what it adds to the numerator beyond its share (the delta method).
    """
    shares = []
    for each in (parts, over):
        whole = total(each)
        shares.append([(part.accepted - (whole.length - 1) * part.drafts) / whole.drafts for part in each])
    squares = sum((ours - theirs) ** 2 for ours, theirs in zip(*shares, strict=True))
    return total(parts).length - total(over).length, (len(parts) / (len(parts) - 1) * squares) ** 0.5


def chances(
    draft_logits_NV: Tensor, target_logits_NV: Tensor, tokens_N: Tensor, temperature: float
) -> dict[str, Tensor]:
    """For each of N positions of a text that the target wrote at that temperature, float32 [N] by name.

    greedy: whether the draft's most likely token is the text's (a target that samples from p and compares does what
        rejection sampling of a certain proposal does). sampled: min(1, q / p) of the text's token, the chance that it
        was an accepted proposal and not the target's own. overlap, top: as in `Offline`.
    """
    best_N = draft_logits_NV.argmax(-1)
    same_N = (best_N == tokens_N).float()
    if temperature == 0:
        agreed_N = (best_N == target_logits_NV.argmax(-1)).float()
        return {"greedy": same_N, "sampled": same_N, "overlap": agreed_N, "top": agreed_N}
    p_NV = (target_logits_NV.float() / temperature).softmax(-1)
    q_NV = (draft_logits_NV.float() / temperature).softmax(-1)
    p_N, q_N = (each.gather(-1, tokens_N[:, None])[:, 0] for each in (p_NV, q_NV))
    return {
        "greedy": same_N, "sampled": (q_N / p_N.clamp(min=1e-20)).clamp(max=1),
        "overlap": torch.minimum(p_NV, q_NV).sum(-1), "top": p_NV.gather(-1, best_N[:, None])[:, 0],
    }  # fmt: skip


def measure(
    session: Session, target: Path, draft: Path, held_out: Sequence[Exchange], *, k: int, longest: int, folder: Path,
    report: Report, what: str, temperature: float = 0.0, seed: int = 0,
    method: Literal["draft_model", "eagle3"] = "draft_model",
) -> Acceptance:  # fmt: skip
    """Acceptance on the real vLLM: the target answers the held-out prompts with the draft before it."""
    stop = stop_tokens(target)
    requests = [
        offline.Request(
            name=f"held-out-{number}", prompt=exchange.prompt, max_tokens=longest, stop_token_ids=stop,
            temperature=temperature, seed=seed * 1_000_003 + number if temperature else None,
        )
        for number, exchange in enumerate(held_out)
    ]  # fmt: skip
    room = max(len(exchange.prompt) for exchange in held_out) + longest + k + 1
    job = offline.Job(
        model=str(target), draft=str(draft), speculative_method=method, speculative_tokens=k, requests=requests,
        max_model_len=room, max_num_seqs=32,
    )  # fmt: skip
    _, counted = session.run(job, folder, on_result=lambda done, total: report(what, done, total))
    assert counted is not None
    per_position = [float(count) for count in counted.accepted_per_position]
    return Acceptance(counted.drafts, counted.proposed, counted.accepted, per_position)
