"""How many of a draft's tokens the target accepts: exactly, along the target's text, and by vLLM's own counters."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from quantkit import offline
from quantkit.conversations import Exchange, stop_tokens
from quantkit.offline import Session
from quantkit.progress import Report


class Acceptance(NamedTuple):
    """Counts over many drafts of `k` tokens each."""

    drafts: int
    proposed: int
    accepted: int
    per_position: list[int]  # accepted at draft position 0, 1, ...

    @property
    def rate(self) -> float:
        """Accepted / proposed."""
        return self.accepted / max(self.proposed, 1)

    @property
    def length(self) -> float:
        """Accepted length: tokens a step of the target, 1 + accepted / drafts."""
        return 1 + self.accepted / max(self.drafts, 1)

    def summary(self) -> dict[str, float | int | list[float]]:
        """For manifests and reports."""
        return {
            "acceptance_rate": round(self.rate, 4),
            "accepted_length": round(self.length, 4),
            "per_position": [round(count / max(self.drafts, 1), 4) for count in self.per_position],
            "drafts": self.drafts,
            "proposed": self.proposed,
            "accepted": self.accepted,
        }


def simulate_greedy(matches: Sequence[bool], k: int) -> Acceptance:
    """Greedy speculation of `k` tokens along a target's greedy text, counted exactly.

    `matches[t]` says whether the draft's argmax after the text up to t is the text's own next token. Accepted tokens
    are the text itself, so the draft always continues from the text, and one forward pass tells every step.
    """
    position, drafts, per_position = 0, 0, [0] * k
    while position < len(matches):
        accepted = 0
        while accepted < k and position + accepted < len(matches) and matches[position + accepted]:
            per_position[accepted] += 1
            accepted += 1
        position += accepted + 1  # the target's own token follows the accepted ones
        drafts += 1
    return Acceptance(drafts, drafts * k, sum(per_position), per_position)


def total(parts: Sequence[Acceptance]) -> Acceptance:
    """The counts of several texts together."""
    positions = zip(*(part.per_position for part in parts), strict=True)
    return Acceptance(
        sum(part.drafts for part in parts), sum(part.proposed for part in parts),
        sum(part.accepted for part in parts), [sum(column) for column in positions],
    )  # fmt: skip


def measure(
    session: Session, target: Path, draft: Path, held_out: Sequence[Exchange], *, k: int, longest: int, folder: Path,
    report: Report, what: str,
) -> Acceptance:  # fmt: skip
    """Acceptance on the real vLLM: the target answers the held-out prompts greedily with the draft before it."""
    stop = stop_tokens(target)
    requests = [
        offline.Request(name=f"held-out-{number}", prompt=exchange.prompt, max_tokens=longest, stop_token_ids=stop)
        for number, exchange in enumerate(held_out)
    ]
    room = max(len(exchange.prompt) for exchange in held_out) + longest + k + 1
    job = offline.Job(
        model=str(target), draft=str(draft), speculative_tokens=k, requests=requests, max_model_len=room,
        max_num_seqs=32,
    )  # fmt: skip
    _, counted = session.run(job, folder, on_result=lambda done, total: report(what, done, total))
    assert counted is not None
    return Acceptance(counted.drafts, counted.proposed, counted.accepted, counted.accepted_per_position)
