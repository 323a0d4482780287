"""How long does a token take: time to the first, from one to the next, with and without speculation, by batch size."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from quantkit.capacity import roofline
from quantkit.capacity.roofline import Machine, Reads

MOST_SEQUENCES = 1 << 14  # up to where the batch size is sought at which speculation turns negative


class Point(BaseModel):
    """So many sequences decoded at once: seconds from token to token of each, tokens a second of all; both again with
    speculation, whose step gives each sequence `accepted_length` tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    sequences: int
    itl_s: float
    tokens_per_s: float
    speculative_itl_s: float | None = None
    speculative_tokens_per_s: float | None = None

    @property
    def speedup(self) -> float | None:
        """How many times as fast with speculation."""
        return None if self.speculative_itl_s is None else self.itl_s / self.speculative_itl_s


class Speculation(NamedTuple):
    """A draft as the arithmetic has it: what its pass reads, tokens it proposes, tokens a step yields."""

    draft: Reads
    tokens: int
    accepted_length: float


def accepted_length(acceptance: float, tokens: int) -> float:
    """Expected tokens of a step in which each proposed token is accepted with this probability, given those before it.

    (1 - a^(k+1)) / (1 - a), Leviathan et al. (arXiv 2211.17192), equation 1.
    """
    return tokens + 1 if acceptance == 1 else (1 - acceptance ** (tokens + 1)) / (1 - acceptance)


def prefill_s(model: Reads, machine: Machine, prompt_tokens: int) -> float:
    """Seconds to read a prompt alone: of its tokens, half of the others are each one's context on average."""
    return roofline.pass_s(model, machine, rows=prompt_tokens, sequences=1, context_tokens=prompt_tokens // 2)


def point(
    target: Reads, machine: Machine, speculation: Speculation | None, *, sequences: int, context_tokens: int
) -> Point:
    """What a batch of so many sequences gives, each with so many tokens of context."""
    step_s = roofline.pass_s(target, machine, rows=sequences, sequences=sequences, context_tokens=context_tokens)
    if speculation is None:
        return Point(sequences=sequences, itl_s=step_s, tokens_per_s=sequences / step_s)
    long_step_s = roofline.speculative_step_s(
        target, speculation.draft, machine, sequences=sequences, tokens=speculation.tokens,
        context_tokens=context_tokens,
    )  # fmt: skip
    itl_s = long_step_s / speculation.accepted_length
    return Point(
        sequences=sequences, itl_s=step_s, tokens_per_s=sequences / step_s, speculative_itl_s=itl_s,
        speculative_tokens_per_s=sequences / itl_s,
    )  # fmt: skip


def turns_negative(at: Callable[[int], Point]) -> int | None:
    """The smallest batch at which speculation is slower than none; None where it is not up to MOST_SEQUENCES.

    Sought by doubling and then halving: once drafts cost operations instead of bytes, they only lose.
    """

    def slower(sequences: int) -> bool:
        return (at(sequences).speedup or 1) < 1

    if slower(1):
        return 1
    above = 2
    while not slower(above):
        above *= 2
        if above > MOST_SEQUENCES:
            return None
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (below, middle) if slower(middle) else (middle, above)
    return above


def batch_sizes(users: int, sequences: int) -> Sequence[int]:
    """The batch sizes that a plan shows: doubling up to what fits, with the users that were asked for."""
    doubled = {1 << power for power in range(0, 11, 2) if 1 << power <= max(sequences, 1)}
    return sorted(doubled | {users})
