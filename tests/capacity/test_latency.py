"""Seconds a token and what speculation does to them, against formulas written out by hand and against draws."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.capacity import cost, latency, roofline
from quantkit.capacity.latency import Speculation
from quantkit.capacity.roofline import Machine, Measured, Reads

H100 = Machine("an H100", 3.35e12, 989e12)
TARGET = Reads(36_610_000_000, 138_000_000_000, 163_840)
DRAFT = Reads(2_200_000_000, 2_200_000_000, 2_048)


def test_accepted_length_as_drawn() -> None:
    """A step ends with the first token that is not accepted, and always gives one of the target's own."""
    draws = random.Random(0)
    steps = 40_000
    total = 0
    for _ in range(steps):
        length = 1
        while length <= 5 and draws.random() < 0.7:
            length += 1
        total += length
    assert latency.accepted_length(0.7, 5) == pytest.approx(total / steps, abs=0.02)
    assert latency.accepted_length(0.7, 5) == pytest.approx(1 + 0.7 + 0.7**2 + 0.7**3 + 0.7**4 + 0.7**5)
    assert (latency.accepted_length(0, 5), latency.accepted_length(1, 5)) == (1, 6)


def test_a_batch_by_hand() -> None:
    found = latency.point(TARGET, H100, Speculation(DRAFT, 5, 2.94), sequences=32, context_tokens=4000)
    cache = 32 * 4000
    plain = (36.61e9 + cache * 163_840) / 3.35e12
    drafting = 5 * (2.2e9 + cache * 2_048) / 3.35e12
    verifying = max((36.61e9 + cache * 163_840) / 3.35e12, 192 * 138e9 / 989e12)
    assert found.itl_s == pytest.approx(plain)
    assert found.tokens_per_s == pytest.approx(32 / plain)
    assert found.speculative_itl_s == pytest.approx((drafting + verifying) / 2.94)


@given(st.floats(0.05, 0.95), st.integers(1, 8), st.integers(1 << 8, 1 << 12))
def test_where_speculation_turns_negative(acceptance: float, tokens: int, context: int) -> None:
    speculated = Speculation(DRAFT, tokens, latency.accepted_length(acceptance, tokens))

    def speedup(sequences: int) -> float:
        at = latency.point(TARGET, H100, speculated, sequences=sequences, context_tokens=context)
        assert at.speedup is not None
        return at.speedup

    turned = latency.turns_negative(
        lambda n: latency.point(TARGET, H100, speculated, sequences=n, context_tokens=context)
    )
    if turned is None:
        assert speedup(latency.MOST_SEQUENCES) >= 1
    else:
        assert speedup(turned) < 1
        assert turned == 1 or speedup(turned - 1) >= 1


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_batch_costs_no_less_time_than_a_smaller_one(one: int, other: int) -> None:
    few, many = sorted((one, other))
    points = [latency.point(TARGET, H100, None, sequences=n, context_tokens=2048) for n in (few, many)]
    assert points[0].itl_s <= points[1].itl_s
    assert points[0].tokens_per_s <= points[1].tokens_per_s * 1.0001


def test_a_prompt_is_bound_by_operations() -> None:
    wide = TARGET._replace(attention_operations=2_621_440)
    expected = 4000 * (138e9 + 2000 * 2_621_440) / 989e12
    assert latency.prefill_s(wide, H100, 4000) == pytest.approx(expected)


def test_a_processor_by_what_was_measured() -> None:
    seen = Measured(
        processor="any", threads=1, four_bit_in="float32", fp8_cache=False, inputs=[64],
        products={"float32": {1: 4.0, 8: 16.0}, "bfloat16": {1: 6.0, 8: 9.0}}, layer_us={1: 200.0, 9: 280.0},
    )  # fmt: skip
    machine = Machine("any", 1e10, 1e10, seen)
    model = Reads(0, 0, 1000, products={"float32": 1_000_000, "bfloat16": 500_000}, layers=10)
    found = roofline.pass_s(model, machine, rows=1, sequences=1, context_tokens=50)
    products = 2e6 / 4e9 + 1e6 / 6e9
    assert found == pytest.approx(13 * 2.5 * 200e-6 + products + 50_000 / 1e10)
    assert roofline.pass_s(model._replace(layers=-3), machine, rows=16, sequences=0, context_tokens=0) == pytest.approx(
        16 * 2e6 / 16e9 + 16 * 1e6 / 9e9
    ), "beyond the last number of rows its rate goes on"
    started = roofline.pass_s(model._replace(products={}), machine, rows=5, sequences=0, context_tokens=0)
    assert started == pytest.approx(13 * (2.5 * 200e-6 + 40e-6)), "what more rows take is no start"
    # 4 rows lie 3/7 of the way from 1 to 8, in seconds
    between = 2 * 1e6 / 1e9 * (4 / 7 * 1 / 4 + 3 / 7 * 8 / 16)
    only = model._replace(layers=-3, products={"float32": 1_000_000})
    assert roofline.pass_s(only, machine, rows=4, sequences=0, context_tokens=0) == pytest.approx(between)


def test_a_million_tokens_by_hand() -> None:
    """8 sequences, 100 answer tokens at 10 ms and 8 prompts at 50 ms: 800 tokens in 1.4 s, on two GPUs at $3."""
    found = cost.sustained(
        sequences=8, itl_s=0.01, prefill_s=0.05, prompt_tokens=300, answer_tokens=100, replicas=1, gpus=2,
        price_per_hour=3.0,
    )  # fmt: skip
    assert found.answer_tokens_per_s == pytest.approx(800 / 1.4)
    assert found.per_million_answer_tokens == pytest.approx(6 / 3600 * 1e6 * 1.4 / 800)
    assert found.per_million_tokens == pytest.approx(6 / 3600 * 1e6 * 1.4 / 3200)
    assert cost.implied_price_per_hour(0.35, 120) == pytest.approx(0.1512)
    assert cost.implied_price_per_hour(cost.dollars_per_million(3.0, 77), 77) == pytest.approx(3.0)
