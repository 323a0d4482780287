"""What a server makes of a draft's plan: how many tokens, or none, and why."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit import speculation
from quantkit.speculation import Load, Option, Plan


def plan(*loads: tuple[int, dict[int, tuple[float, float]]], **changes: Any) -> Plan:
    """A plan of loads: sequences, and (speed-up, standard error) by number of draft tokens."""
    values: dict[str, Any] = {
        "profile": "cpu", "origin": "measured", "machine": "a processor", "context_tokens": 128,
        "measured_positions": 4, "accepted_length": [], "accepted_length_standard_error": [],
        "loads": [
            Load(concurrency=size, step_s=0.01, options=[
                Option(tokens=k, speedup=times, standard_error=error) for k, (times, error) in options.items()
            ])
            for size, options in loads
        ],
    }  # fmt: skip
    return Plan.model_validate(values | changes)


FALLING = plan(
    (1, {1: (1.3, 0.01), 2: (1.5, 0.01), 3: (1.6, 0.01)}),
    (8, {1: (1.2, 0.01), 2: (1.25, 0.01), 3: (1.1, 0.01)}),
    (32, {1: (0.95, 0.01), 2: (0.8, 0.01), 3: (0.6, 0.01)}),
)


@pytest.mark.parametrize(("max_num_seqs", "tokens"), [(1, 3), (2, 2), (8, 2), (9, 0), (32, 0), (100, 0)])
def test_the_number_is_the_one_that_pays_at_every_load(max_num_seqs: int, tokens: int) -> None:
    assert speculation.decide("auto", FALLING, max_num_seqs=max_num_seqs).tokens == tokens


def test_the_reason_is_said() -> None:
    off = speculation.decide("auto", FALLING, max_num_seqs=32)
    assert off.why.startswith("off") and "1 draft token with 32 sequences at once: 0.95 +- 0.02" in off.why
    assert "measured on a processor" in off.why
    assert speculation.decide("auto", FALLING, max_num_seqs=8).why.startswith("on: ")
    beyond = speculation.decide("always", FALLING, max_num_seqs=64)
    assert beyond.tokens == 1 and "beyond 32 nothing is known" in beyond.why and "not sure to pay" in beyond.why
    estimated = FALLING.model_copy(update={"origin": "estimated"})
    assert "an estimate" in speculation.decide("auto", estimated, max_num_seqs=8).why


def test_a_plan_is_said_in_words() -> None:
    assert speculation.in_words(FALLING) == (
        "one sequence at once: 3 draft tokens, 1.60 +- 0.02 times as fast; 8 sequences at once: 2 draft tokens, "
        "1.25 +- 0.02 times as fast; 32 sequences at once: do not speculate"
    )
    never = plan((1, {1: (0.7, 0.01), 2: (0.6, 0.01)}), (8, {1: (0.8, 0.01), 2: (0.7, 0.01)}))
    assert speculation.in_words(never) == (
        "do not speculate: at best 1 draft token with 8 sequences at once: 0.80 +- 0.02 times as fast"
    )


def test_two_standard_errors_decide() -> None:
    for error, tokens in ((0.049, 2), (0.051, 0)):
        one = plan((1, {2: (1.1, error)}))
        assert speculation.decide("auto", one, max_num_seqs=1).tokens == tokens and one.loads[0].tokens == tokens


def test_a_number_that_is_asked_for_stays() -> None:
    assert speculation.decide("auto", FALLING, max_num_seqs=8, tokens=1).tokens == 1
    assert speculation.decide("auto", FALLING, max_num_seqs=32, tokens=3).tokens == 0
    assert speculation.decide("always", FALLING, max_num_seqs=32, tokens=3).tokens == 3
    unknown = speculation.decide("auto", FALLING, max_num_seqs=8, tokens=7)
    assert unknown.tokens == 7 and "the plan knows 1 to 3" in unknown.why


def test_without_a_plan_it_is_on_and_never_is_never() -> None:
    for speculate, tokens in (("auto", 4), ("always", 4), ("never", 0)):
        assert speculation.decide(speculate, None, max_num_seqs=32).tokens == tokens  # type: ignore[arg-type]
    assert speculation.decide("never", FALLING, max_num_seqs=1).tokens == 0
    assert speculation.decide("auto", None, max_num_seqs=32, tokens=2).tokens == 2


def test_manifests_carry_plans_there_and_back() -> None:
    gpu = FALLING.model_copy(update={"profile": "gpu"})
    assert speculation.read(speculation.summary([FALLING, gpu])) == {"cpu": FALLING, "gpu": gpu}
    assert speculation.read({"vllm": {}}) == {}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=5, unique_by=lambda pair: pair[0]),
    st.integers(1, 60),
)
def test_a_schedule_says_one_number_for_each_load(loads: list[tuple[int, int]], max_num_seqs: int) -> None:
    """At a measured load its own; between two no more than either's; vLLM wants ranges from 1 on, without gaps."""
    best = dict(sorted(loads))
    drawn = _by_load(best)
    found = speculation.schedule(drawn, max_num_seqs=max_num_seqs)
    if not found:
        within = {tokens for size, tokens in best.items() if size <= max_num_seqs}
        assert len(within) <= 1
        return
    assert found[0][0] == 1 and found[-1][1] == max_num_seqs
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(found))
    by_size = {size: tokens for first, last, tokens in found for size in range(first, last + 1)}
    for size, tokens in best.items():
        if size <= max_num_seqs:
            assert by_size[size] == tokens
    for below, above in itertools.pairwise(best):
        for size in range(below + 1, min(above, max_num_seqs + 1)):
            assert by_size[size] == min(best[below], best[above])


def test_by_load_it_is_on_where_it_pays() -> None:
    drawn = _by_load({1: 4, 8: 2, 32: 0})
    found = speculation.decide("auto", drawn, max_num_seqs=32, by_load=True)
    assert found.tokens == 4 and "32 sequences at once: do not speculate" in found.why
    assert speculation.decide("auto", drawn, max_num_seqs=32).tokens == 0


def _by_load(best: dict[int, int]) -> Plan:
    """At each number of sequences one number of draft tokens pays, or none does."""
    loads = ((size, {k: (1.5 if k == tokens else 0.9, 0.01) for k in range(1, 6)}) for size, tokens in best.items())
    return plan(*loads)
