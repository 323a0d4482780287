"""How many tokens should the draft propose, and is it worth having: from acceptance and the seconds of real steps.

A step of speculation drafts k tokens for each of B sequences and has the target verify them, which yields tau tokens a
sequence (the accepted length); a step without it yields one. So the speed-up is tau * T(B) / S(B, k), with T and S the
seconds of either step. With passes of the two models in place of whole steps, S is what Leviathan et al. (arXiv
2211.17192, theorem 3.8) have as k c + 1 times T, with two terms more: the target's pass is over B (k + 1) tokens, and
vLLM's draft first reads what the last step may have accepted, B (k + 2) tokens with padding, before it goes on token by
token.
"""

import statistics
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Literal, NamedTuple

from quantkit import offline, vllm_environment
from quantkit.capacity import machines, roofline
from quantkit.capacity.roofline import Machine, Reads
from quantkit.checkpoint import open_checkpoint
from quantkit.draft.acceptance import Acceptance
from quantkit.offline import Session
from quantkit.progress import Report
from quantkit.speculation import Load, Option, Plan, Profile


class Sweep(NamedTuple):
    """Which steps are timed: every number of draft tokens with every number of sequences.

    Between two numbers of tokens seconds go in straight lines. Every concurrency is timed in `rounds` rounds of
    `steps` steps.
    """

    concurrencies: Sequence[int]
    tokens: Sequence[int]
    context_tokens: int
    steps: int
    rounds: int = 3


# A processor takes seconds for what a GPU does in milliseconds, reading prompts above all, and most of its time goes to
# starting the engines; processor time scatters little, so a few steps are enough.
SWEEPS: dict[Profile, Sweep] = {
    "cpu": Sweep((1, 8), (1, 4), context_tokens=32, steps=2),
    "gpu": Sweep((1, 4, 16, 64), (1, 4, 8), context_tokens=1024, steps=16),
}


class Measured(NamedTuple):
    """A mean and its standard error."""

    value: float
    standard_error: float


class Costs(NamedTuple):
    """Seconds of steps, by number of sequences and, where it speculates, of draft tokens."""

    profile: Profile
    origin: Literal["measured", "estimated"]
    machine: str
    context_tokens: int
    plain: Mapping[int, Measured]
    speculative: Mapping[int, Mapping[int, Measured]]


def plans(
    session: Session, target: Path, drafts: Mapping[str, Path], acceptance: Mapping[str, Acceptance], *, folder: Path,
    report: Report, method: Literal["draft_model", "eagle3"] = "draft_model",
) -> dict[str, list[Plan]]:  # fmt: skip
    """For each draft a plan from steps measured on this machine and, where that has no GPU, an estimated one for GPUs.

    acceptance: of each draft, counted by vLLM at temperature 0.
    """
    sweep = SWEEPS["cpu" if vllm_environment.is_cpu_build() else "gpu"]
    found: dict[str, list[Plan]] = {}
    for name, costs in measure_costs(
        session, target, drafts, sweep, method=method, folder=folder, report=report
    ).items():
        found[name] = [make(acceptance[name], costs)]
        if costs.profile == "cpu":
            draft = drafts[name]
            read = roofline.reads(draft) if method == "draft_model" else roofline.reads_of_head(draft)
            on_gpu = estimate_costs(roofline.reads(target), read, machines.find(machines.ASSUMED).roof())
            found[name].append(make(acceptance[name], on_gpu))
    return found


def make(acceptance: Acceptance, costs: Costs) -> Plan:
    """The plan of a draft: for each concurrency, what each number of draft tokens is expected to give."""
    loads, lengths = [], []
    for concurrency, plain in costs.plain.items():
        timed = costs.speculative[concurrency]
        numbers = range(min(timed), max(timed) + 1)
        lengths = [accepted_length(acceptance, k) for k in numbers]
        options = [
            _option(k, speedup(length, plain, between(timed, k))) for k, length in zip(numbers, lengths, strict=True)
        ]
        loads.append(Load(concurrency=concurrency, step_s=_rounded(plain.value), options=options))
    return Plan(
        profile=costs.profile, origin=costs.origin, machine=costs.machine, context_tokens=costs.context_tokens,
        measured_positions=len(acceptance.per_position),
        accepted_length=[_rounded(length.value) for length in lengths],
        accepted_length_standard_error=[_rounded(length.standard_error) for length in lengths],
        loads=sorted(loads, key=lambda load: load.concurrency),
    )  # fmt: skip


def accepted_length(acceptance: Acceptance, k: int) -> Measured:
    """Expected tokens of a step with k draft tokens, and its standard error over drafts.

    1 + the sum of P(i), the share of drafts whose first i tokens were all accepted, as counted. Beyond the positions
    counted, P falls by the last conditional rate at each, whose own error is added (the delta method). Drafts are taken
    as independent, which those of one answer are not quite: the error is a little small.
    """
    counts, drafts = acceptance.per_position, max(acceptance.drafts, 1)
    reached = [count / drafts for count in counts]
    before = counts[-2] if len(counts) > 1 else drafts
    last = counts[-1] / max(before, 1)
    beyond = range(1, k - len(counts) + 1)
    reached += [reached[-1] * last**step for step in beyond]
    reached = reached[:k]
    mean = sum(reached)
    square = sum((2 * place - 1) * share for place, share in enumerate(reached, start=1))
    variance = (square - mean**2) / drafts
    slope = counts[-1] / drafts * sum(step * last ** (step - 1) for step in beyond)
    variance += slope**2 * last * (1 - last) / max(before, 1)
    return Measured(1 + mean, sqrt(max(variance, 0.0)))


def speedup(length: Measured, plain: Measured, speculative: Measured) -> Measured:
    """Tokens a second with speculation over those without; relative errors add in squares.

    At most the accepted length: a step that speculates has the target's pass within it, so where it was timed as
    shorter than one that does not, that is noise.
    """
    value = length.value * min(plain.value / speculative.value, 1)
    relative = sqrt(sum((part.standard_error / part.value) ** 2 for part in (length, plain, speculative)))
    return Measured(value, value * relative)


def between(timed: Mapping[int, Measured], k: int) -> Measured:
    """Seconds of a step with k draft tokens: as timed, or on the straight line between the neighbours that were."""
    below, above = max(n for n in timed if n <= k), min(n for n in timed if n >= k)
    if below == above:
        return timed[k]
    part = (k - below) / (above - below)
    value = (1 - part) * timed[below].value + part * timed[above].value
    error = sqrt(((1 - part) * timed[below].standard_error) ** 2 + (part * timed[above].standard_error) ** 2)
    return Measured(value, error)


def measure_costs(
    session: Session, target: Path, drafts: Mapping[str, Path], sweep: Sweep, *, folder: Path, report: Report,
    method: Literal["draft_model", "eagle3"] = "draft_model",
) -> dict[str, Costs]:  # fmt: skip
    """Seconds of the real vLLM's steps on this machine, without a draft and with each of these.

    What a step takes does not depend on how much is accepted: vLLM pads what was not. So any text will do, and each
    step is the very one that a server makes. A round gives the median of its steps, the rounds a mean and its standard
    error; steps without a draft are timed first and last, so that a machine that became slower or faster meanwhile
    shows in that error.
    """
    vocabulary = open_checkpoint(target).arch.vocab_size
    most = max(sweep.concurrencies)
    # any tokens, but of each sequence its own: what shares a prefix would share its cache
    prompts = [[(7919 * row + 31 * place) % vocabulary for place in range(sweep.context_tokens)] for row in range(most)]
    engines: list[tuple[str, Path | None, int]] = [
        ("first", None, 0), *((name, path, k) for name, path in drafts.items() for k in sweep.tokens), ("last", None, 0)
    ]  # fmt: skip
    found: dict[tuple[str, int], offline.Seconds] = {}
    for number, (name, draft, k) in enumerate(engines):
        report("timing steps, engine", number, len(engines))
        # while prompts are read piece by piece, sequences that began go on
        room = (sweep.steps + 4 + most * sweep.context_tokens // 2048) * (k + 1)
        timing = offline.Timing(
            model=str(target), draft=str(draft) if draft else None, speculative_method=method,
            speculative_tokens=max(k, 1), prompts=prompts,
            batches=[*sweep.concurrencies] * sweep.rounds, steps=sweep.steps,
            max_model_len=sweep.context_tokens + room, max_num_seqs=most,
        )  # fmt: skip
        found[name, k] = session.time(timing, folder / f"{name}-{k}")

    def seconds(place: int, *of: tuple[str, int]) -> Measured:
        batches = [batch for key in of for batch in found[key].steps[place :: len(sweep.concurrencies)]]
        rounds = [statistics.median(batch) for batch in batches]
        return Measured(statistics.mean(rounds), statistics.stdev(rounds) / sqrt(len(rounds)))

    places = {size: place for place, size in enumerate(sweep.concurrencies)}
    return {
        name: Costs(
            profile="cpu" if vllm_environment.is_cpu_build() else "gpu", origin="measured",
            machine=found["first", 0].machine, context_tokens=sweep.context_tokens,
            plain={size: seconds(place, ("first", 0), ("last", 0)) for size, place in places.items()},
            speculative={size: {k: seconds(place, (name, k)) for k in sweep.tokens} for size, place in places.items()},
        )
        for name in drafts
    }  # fmt: skip


def estimate_costs(
    target: Reads, draft: Reads, machine: Machine, *, context_tokens: int = 1024,
    concurrencies: Sequence[int] = SWEEPS["gpu"].concurrencies, tokens: Sequence[int] = tuple(range(1, 9)),
) -> Costs:  # fmt: skip
    """Seconds of steps on a GPU by the roofline.

    An estimate in the draft's favour: small models reach their roof least of all, and vLLM 0.32 runs a separate draft
    without the CUDA graphs that spare its target the start of each kernel.
    """

    def plain_s(size: int) -> float:
        return roofline.pass_s(target, machine, rows=size, sequences=size, context_tokens=context_tokens)

    def step_s(size: int, k: int) -> float:
        return roofline.speculative_step_s(
            target, draft, machine, sequences=size, tokens=k, context_tokens=context_tokens
        )

    return Costs(
        profile="gpu", origin="estimated", machine=machine.name, context_tokens=context_tokens,
        plain={size: Measured(plain_s(size), 0.0) for size in concurrencies},
        speculative={size: {k: Measured(step_s(size, k), 0.0) for k in tokens} for size in concurrencies},
    )  # fmt: skip


def _option(k: int, found: Measured) -> Option:
    return Option(tokens=k, speedup=_rounded(found.value), standard_error=_rounded(found.standard_error))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
