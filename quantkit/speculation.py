"""When does speculation pay: the plan that a draft's manifest carries, and what a bundle makes of it.

The draft's side writes plans (`draft.plan`) and the serving side reads them; they meet here and on disk alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from quantkit import foreign
from quantkit.errors import QuantkitError, refusing

Profile = Literal["gpu", "cpu"]
Speculate = Literal["auto", "always", "never"]

PLACES: dict[Profile, str] = {"gpu": "GPUs", "cpu": "a CPU"}  # in sentences
RESULTS_KEY = "plan"  # in the results of a draft's manifest: a plan for each kind of machine that has one
TOKENS_WITHOUT_PLAN = 4
# How far below its expectation a speed-up is held for possible: two, as drafts for one answer resemble each other and
# counts alone, which know nothing of that, give too small a standard error.
STANDARD_ERRORS = 2
_ROUNDED = 2e-3  # of an accepted length: both are written with some digits


class Option(BaseModel):
    """Drafting `tokens` at a time: how many times as fast as without, and its standard error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    tokens: PositiveInt
    speedup: float
    standard_error: NonNegativeFloat

    @property
    def lower(self) -> float:
        """The least speed-up that is held for possible."""
        return self.speedup - STANDARD_ERRORS * self.standard_error


class Load(BaseModel):
    """So many sequences decoded at once: seconds of a step without speculation, and every option."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    concurrency: PositiveInt
    step_s: float
    options: list[Option] = Field(min_length=1)

    @property
    def best(self) -> Option:
        """The option with the highest lower bound."""
        return max(self.options, key=lambda option: option.lower)

    @property
    def tokens(self) -> int:
        """The best number of draft tokens; 0 where none is sure to pay."""
        return self.best.tokens if self.best.lower > 1 else 0


class Plan(BaseModel):
    """What a draft is expected to give on one machine, by number of sequences, at temperature 0.

    `measured_positions` is how many draft positions acceptance was counted at: with more tokens than that, each further
    one is taken to be accepted as often as the last counted one, given that those before it were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    profile: Profile
    origin: Literal["measured", "estimated"]  # of the seconds; acceptance is always counted
    machine: str
    context_tokens: NonNegativeInt
    measured_positions: NonNegativeInt
    accepted_length: list[float]  # with 1, 2, ... draft tokens
    accepted_length_standard_error: list[float]
    loads: list[Load] = Field(min_length=1)  # by rising concurrency

    @property
    def basis(self) -> str:
        """Where its seconds come from, in words."""
        if self.origin == "measured":
            return f"steps measured on {self.machine}"
        return f"an estimate for {self.machine} from bytes and operations, in the draft's favour, not a measurement"

    def up_to(self, concurrency: int) -> list[Load]:
        """The loads that a server of so many sequences will see: up to the first that covers them all."""
        below = [load for load in self.loads if load.concurrency < concurrency]
        return self.loads[: len(below) + 1]


class _Plans(BaseModel):
    plan: list[Plan]


class Decision(NamedTuple):
    """How many tokens a profile of a bundle drafts, 0 for none, and why."""

    tokens: int
    why: str


def read(results: Mapping[str, Any]) -> dict[Profile, Plan]:
    """The plans in the results of a draft's manifest; none where it was made without.

    Raises:
        QuantkitError: what is there is no plan, or it counts on another accepted length than vLLM counted, by the same
            results.
    """
    found = foreign.validated(
        _Plans, {RESULTS_KEY: results.get(RESULTS_KEY, [])}, where="the draft's manifest",
        remedy="run train-draft again",
    )  # fmt: skip
    plans: dict[Profile, Plan] = {plan.profile: plan for plan in found.plan}
    with refusing("the draft's manifest holds no acceptance", "run train-draft again"):
        counted = results.get("acceptance", {}).get(results.get("kept"), {}).get("0", {}).get("vllm")
        for plan in plans.values() if counted else ():
            said = plan.accepted_length[plan.measured_positions - 1]
            if abs(said - counted["accepted_length"]) > _ROUNDED * said:
                raise QuantkitError(
                    f"the draft's plan counts on an accepted length of {said:g}, and vLLM counted "
                    f"{counted['accepted_length']:g}: run quantkit train-draft again"
                )
    return plans


def summary(plans: Sequence[Plan]) -> dict[str, Any]:
    """What the results of a draft's manifest say of its plans."""
    return {RESULTS_KEY: [plan.model_dump(mode="json") for plan in plans]}


def decide(
    speculate: Speculate, plan: Plan | None, *, max_num_seqs: int, tokens: int | None = None, by_load: bool = False
) -> Decision:
    """Whether a server of up to `max_num_seqs` sequences speculates, and by how many tokens.

    For a separate draft it is one number for every load: vLLM 0.32 has `num_speculative_tokens_per_batch_size`, but
    there its newer model runner makes all passes whatever that says, and the older one the first of them. So it is the
    number whose lower bound is highest at the load where that is lowest: a server that speculates by `auto` is at no
    load expected to be slower than one that does not.

    tokens: asked for instead of the plan's; with `auto` it only remains whether they pay.
    by_load: vLLM follows a schedule by number of sequences: at each load the number that is sure to pay there, if any.
    """
    if speculate == "never":
        return Decision(0, "not wanted: serve.speculate is never")
    if plan is None:
        return Decision(
            tokens or TOKENS_WITHOUT_PLAN, "on: the draft has no plan for this kind of machine, so whether it pays is "
            "not known",
        )  # fmt: skip
    if by_load:
        return Decision(max(load.tokens for load in plan.loads), f"on by load: {in_words(plan)} ({plan.basis})")
    loads = plan.up_to(max_num_seqs)
    known = [option.tokens for option in loads[0].options]
    if tokens is not None and tokens not in known:
        return Decision(tokens, f"on: {tokens} tokens were asked for, and the plan knows {known[0]} to {known[-1]}")

    def weakest(number: int) -> tuple[Load, Option]:
        found = ((load, option) for load in loads for option in load.options if option.tokens == number)
        return min(found, key=lambda pair: pair[1].lower)

    load, option = max((weakest(number) for number in ([tokens] if tokens else known)), key=lambda pair: pair[1].lower)
    expected = f"{drafted(option.tokens)} with {sequences(load.concurrency)} at once: {times(option)}"
    if max_num_seqs > load.concurrency == plan.loads[-1].concurrency:
        expected += f", and beyond {load.concurrency} nothing is known"
    if option.lower > 1:
        return Decision(option.tokens, f"on: expected at least where it gives least, {expected} ({plan.basis})")
    if speculate == "always":
        return Decision(
            option.tokens, f"on because serve.speculate is always, though not sure to pay: {expected} ({plan.basis})"
        )
    best = "asked for" if tokens else "best number"
    return Decision(0, f"off: not sure to pay at every load up to max-num-seqs. The {best}, {expected} ({plan.basis})")


def schedule(plan: Plan, *, max_num_seqs: int) -> list[tuple[int, int, int]]:
    """(first, last, tokens) by number of sequences, for vLLM's `num_speculative_tokens_per_batch_size`.

    A load's best number holds at that load; between two loads the smaller of theirs; beyond the last, the last's.
    Empty where it is one number for all.
    """
    found: list[tuple[int, int, int]] = []

    def add(first: int, last: int, tokens: int) -> None:
        last = min(last, max_num_seqs)
        if first > last:
            return
        if found and found[-1][2] == tokens:
            first = found.pop()[0]
        found.append((first, last, tokens))

    below, tokens = 0, plan.loads[0].tokens
    for load in plan.loads:
        add(below + 1, load.concurrency - 1, min(tokens, load.tokens))
        add(load.concurrency, load.concurrency, load.tokens)
        below, tokens = load.concurrency, load.tokens
    add(below + 1, max_num_seqs, tokens)
    return found if len(found) > 1 else []


def in_words(plan: Plan) -> str:
    """What a plan says for each number of sequences, in a line."""
    if not any(load.tokens for load in plan.loads):
        best = max(plan.loads, key=lambda load: load.best.speedup)
        expected = f"{drafted(best.best.tokens)} with {sequences(best.concurrency)} at once: {times(best.best)}"
        return f"do not speculate: at best {expected}"
    return "; ".join(
        f"{sequences(load.concurrency)} at once: "
        + (f"{drafted(load.tokens)}, {times(load.best)}" if load.tokens else "do not speculate")
        for load in plan.loads
    )


def sequences(count: int) -> str:
    """A number of sequences in words."""
    return "one sequence" if count == 1 else f"{count} sequences"


def drafted(count: int) -> str:
    """A number of draft tokens in words."""
    return "1 draft token" if count == 1 else f"{count} draft tokens"


def times(option: Option) -> str:
    """An expected speed-up in words."""
    return f"{option.speedup:.2f} +- {STANDARD_ERRORS * option.standard_error:.2f} times as fast"
