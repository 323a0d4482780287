"""Is what somebody claims of a deployment possible: each figure beside what the arithmetic of its plan allows."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from quantkit.capacity import cost, latency, roofline, sizing, weights
from quantkit.capacity.planning import Column, Plan
from quantkit.capacity.roofline import Reads
from quantkit.capacity.weights import Model
from quantkit.recipe import Claim, ClaimName

Verdict = Literal[
    "plausible", "not possible", "not on one GPU", "does not fit", "not at this context", "not both at once",
    "only with speculation", "of all users, not of one", "implies two GPU prices", "needs measuring",
]  # fmt: skip


class Judged(NamedTuple):
    """A claim, what the numbers say of it, and the word that they come to."""

    claim: str
    said: str
    arithmetic: str
    verdict: Verdict


class _Case(NamedTuple):
    """What a claim is held against: the model before, in 16 bits, and after, in its most compact form."""

    plan: Plan
    model: Model
    claims: Mapping[ClaimName, Claim]
    before: Column
    after: Column
    reads_before: Reads
    reads_after: Reads


def judge(plan: Plan, model: Model, claims: Mapping[ClaimName, Claim]) -> list[Judged]:
    """Each claim of a recipe's `plan` section against the plan that was made from it."""
    before, after = plan.columns[0], plan.columns[-1]
    case = _Case(plan, model, claims, before, after, _reads(plan, model, before), _reads(plan, model, after))
    return [one for name in claims for one in _JUDGES[name](case)]


def _reads(plan: Plan, model: Model, column: Column) -> Reads:
    """What one GPU would read of all of the model, whether it fits or not."""
    form = weights.as_stored(model) if column.weights == plan.columns[0].weights else weights.at_4_bits(model)
    cache = sizing.kv_bytes_per_token(model.config, column.kv_cache)
    return weights.reads(form, model, plan.gpu.roof(), cache_bytes=cache, dtype=plan.question.dtype)


def _fits_before(case: _Case) -> tuple[bool, str]:
    """Whether the original fits on the GPUs of the plan, and in words how much too large it is."""
    asked, gpu = case.plan.question, case.plan.gpu
    room = gpu.memory_bytes * asked.memory_utilization * asked.gpus
    told = f"{case.before.stored_bytes / 1e9:.1f} GB of 16-bit weights, {room / 1e9:.1f} GB usable"
    return case.before.chosen is not None, told


def _too_large(case: _Case) -> Verdict:
    return "not on one GPU" if case.plan.question.gpus == 1 else "does not fit"


def _ttft(case: _Case) -> list[Judged]:
    claim, machine = case.claims["ttft_ms"], case.plan.gpu.roof()
    asked = case.plan.question
    rate = machine.operations_per_s * asked.gpus
    found = []
    for which, said in (("before", claim.before), ("after", claim.after)):
        if said is None:
            continue
        bound_s = latency.prefill_s(case.reads_after, machine, asked.prompt_tokens) / asked.gpus
        longest = math.floor(said / 1e3 * rate / case.reads_after.token_operations)
        fits, told = _fits_before(case) if which == "before" else (True, "")
        arithmetic = (
            f"a prompt of {asked.prompt_tokens} tokens takes {bound_s * 1e3:.0f} ms at the peak of operations, in "
            f"{said:g} ms at most {longest:,} tokens are read (or a prefix that is cached)"
        )
        verdict: Verdict = "plausible" if bound_s * 1e3 <= said else "not at this context"
        if not fits:
            arithmetic, verdict = f"{told}; {arithmetic}", _too_large(case)
        found.append(Judged(f"TTFT {which}", f"{said:g} ms", arithmetic, verdict))
    return found


def _tokens_per_s(case: _Case) -> list[Judged]:
    claim, asked = case.claims["tokens_per_s"], case.plan.question
    found = []
    if claim.before is not None:
        fits, told = _fits_before(case)
        best = 1 / _step_s(case.reads_before, case, 1, 0)
        two = f"; were it to fit, {best:.0f} tokens/s at most for one user, at full bandwidth"
        verdict: Verdict = _too_large(case) if not fits else "plausible" if best >= claim.before else "not possible"
        found.append(Judged("tokens/s before", f"{claim.before:g}", told + two, verdict))
    if claim.after is not None:
        users = int(case.claims["users"].after or asked.users) if "users" in case.claims else asked.users
        alone, crowded = (1 / _step_s(case.reads_after, case, many, _decoding(case)) for many in (1, users))
        words = f"{case.after.name}: {alone:.0f} tokens/s a user alone, {crowded:.0f} each with {users} at once"
        points = {point.sequences: point for point in case.after.points}
        spoken = {many: 1 / point.speculative_itl_s for many, point in points.items() if point.speculative_itl_s}
        if spoken:
            words += "; with speculation " + " and ".join(
                f"{spoken[n]:.0f} ({n} at once)" for n in (1, users) if n in spoken
            )
        words += f"; of all {users} together {users * crowded:,.0f}"
        found.append(
            Judged(
                "tokens/s after", f"{claim.after:g}", words, _speed_verdict(claim.after, alone, crowded, spoken, users)
            )
        )
    return found


def _speed_verdict(
    said: float, alone: float, crowded: float, speculating: Mapping[int, float], users: int
) -> Verdict:  # fmt: skip
    if crowded >= said:
        return "plausible"
    if alone >= said:
        return "not both at once"
    if speculating.get(users, 0) >= said:
        return "only with speculation"
    return "not both at once" if speculating.get(1, 0) >= said else "not possible"


def _users(case: _Case) -> list[Judged]:
    claim, asked = case.claims["users"], case.plan.question
    found = []
    for which, said in (("before", claim.before), ("after", claim.after)):
        if said is None:
            continue
        columns = case.plan.columns[:1] if which == "before" else case.plan.columns[1:]
        told = ", ".join(f"{column.chosen.sequences if column.chosen else 0} with {column.name}" for column in columns)
        most = max((column.chosen.sequences for column in columns if column.chosen), default=0)
        verdict: Verdict = "plausible" if most >= said else _too_large(case)
        if which == "before" and not most:
            told = f"{_fits_before(case)[1]}: {told}"
        found.append(Judged(f"users {which}", f"{said:g}", f"of {asked.context} tokens each: {told}", verdict))
    return found


def _price(case: _Case) -> list[Judged]:
    """Prices and speeds that are claimed together imply what an hour of the GPU cost, before and after."""
    claim, speed, users = (case.claims.get(name) for name in ("price_per_1m_tokens", "tokens_per_s", "users"))
    assert claim is not None
    if speed is None or None in (claim.before, claim.after, speed.before, speed.after):
        return [
            Judged("$ a 1M tokens", _arrow(claim, "${:g}"), "nothing is said of the tokens a second", "needs measuring")
        ]
    assert claim.before and claim.after and speed.before and speed.after

    def hour(before: float, after: float) -> tuple[float, float]:
        return (
            cost.implied_price_per_hour(claim.before or 0, before),
            cost.implied_price_per_hour(claim.after or 0, after),
        )

    pairs = [("if those tokens/s are of all users", hour(speed.before, speed.after))]
    if users is not None and users.before and users.after:
        pairs.append(("if of each user", hour(speed.before * users.before, speed.after * users.after)))
    words = "; ".join(f"an hour of the GPU at ${b:.2f} before and ${a:.2f} after, {how}" for how, (b, a) in pairs)
    words += f"; cheaper {claim.before / claim.after:.1f} times, faster {speed.after / speed.before:.1f} times"
    apart = all(max(pair) > 1.1 * min(pair) for _, pair in pairs)
    if case.plan.question.price_per_hour is not None and case.after.cost is not None:
        own = case.after.speculative_cost or case.after.cost
        words += (
            f"; at ${case.plan.question.price_per_hour:g} an hour the plan has "
            f"${own.per_million_answer_tokens:.2f} for answers at best"
        )
    return [Judged("$ a 1M tokens", _arrow(claim, "${:g}"), words, "implies two GPU prices" if apart else "plausible")]


def _drift(case: _Case) -> list[Judged]:
    claim = case.claims["perplexity_drift"]
    assert claim.after is not None
    words = "no arithmetic knows: quantkit eval --max-perplexity-drift measures it, with its interval"
    return [Judged("perplexity drift", f"< {claim.after:.1%}", words, "needs measuring")]


def _acceptance(case: _Case) -> list[Judged]:
    claim, tokens = case.claims["acceptance"], case.plan.question.draft_tokens or 5
    assert claim.after is not None
    length = latency.accepted_length(claim.after, tokens)
    words = (
        f"{length:.2f} tokens a step if each token is accepted with {claim.after:.0%}, which is "
        f"{(length - 1) / tokens:.0%} of what is proposed; {1 + claim.after * tokens:.2f} if {claim.after:.0%} of "
        "all are"
    )
    gain = _gain(case, length)
    return [Judged("acceptance", f"{claim.after:.0%} of {tokens} draft tokens", words + gain, "needs measuring")]


def _gain(case: _Case, length: float) -> str:
    points = [point for point in case.after.points if point.speedup]
    if not points:
        return ""
    told = ", ".join(f"{point.speedup:.2f} with {point.sequences}" for point in points)
    return f"; at best so many times as fast with a draft of its size: {told} at once (upper bound {length:.2f})"


def _kv(case: _Case) -> list[Judged]:
    claim, asked = case.claims["kv_cache_gb"], case.plan.question
    assert claim.after is not None
    context = asked.context
    one = case.reads_before.cache_bytes * context
    sequences = claim.after * 2**30 / one
    words = (
        f"{one / 2**30:g} GiB for one sequence of {context} tokens in 16 bits "
        f"({case.reads_before.cache_bytes:,} bytes a token), {one / 2**31:g} in FP8; {claim.after:g} GiB are "
        f"{sequences:g} sequences, {2 * sequences:g} in FP8"
    )
    verdict: Verdict = "plausible" if sequences <= 1 else "of all users, not of one"
    return [Judged(f"KV cache at {context} tokens", f"{claim.after:g} GB", words, verdict)]


def _step_s(model: Reads, case: _Case, sequences: int, context: int) -> float:
    gpus = case.plan.question.gpus
    machine = case.plan.gpu.roof()
    return roofline.pass_s(model, machine, rows=sequences, sequences=sequences, context_tokens=context) / gpus


def _decoding(case: _Case) -> int:
    return case.plan.question.prompt_tokens + case.plan.question.answer_tokens // 2


def _arrow(claim: Claim, spell: str) -> str:
    return " -> ".join(spell.format(value) for value in (claim.before, claim.after) if value is not None)


_JUDGES: dict[ClaimName, Callable[[_Case], list[Judged]]] = {
    "ttft_ms": _ttft, "tokens_per_s": _tokens_per_s, "users": _users, "price_per_1m_tokens": _price,
    "perplexity_drift": _drift, "acceptance": _acceptance, "kv_cache_gb": _kv,
}  # fmt: skip
