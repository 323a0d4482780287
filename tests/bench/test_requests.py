"""Medians and intervals: against counting by hand, and against what they promise."""

import numpy as np
import pytest

from quantkit.bench import requests
from quantkit.bench.requests import Request


def test_a_median_of_few_has_no_interval() -> None:
    assert requests.median([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, None)
    assert requests.median([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, (1.0, 6.0))  # 2 / 2^6 = 3.1 % outside


@pytest.mark.parametrize("size", [6, 9, 24, 60])
def test_the_interval_holds_the_median_as_often_as_it_says(size: int) -> None:
    random = np.random.default_rng(size)
    held = 0
    for _ in range(2000):
        low, high = requests.median(random.lognormal(0, 1, size).tolist()).interval or (0, 0)
        held += low <= 1 <= high  # the distribution's median
    assert held / 2000 > 0.94


def test_a_ratio_is_of_pairs() -> None:
    """Prompts that take very different times hide a small difference unless each is compared with itself."""
    random = np.random.default_rng(0)
    slow = random.lognormal(0, 2, 24)
    found = requests.ratios(slow.tolist(), (slow / 1.2).tolist())
    assert found is not None and found.interval is not None
    assert found.interval == pytest.approx((1.2, 1.2))
    assert requests.ratios([1.0, None], [None, 1.0]) is None


def test_the_client_counts_tokens_and_not_chunks() -> None:
    seen = {"ttfts": [0.5, 0.2], "latencies": [2.9, 0.2], "output_lens": [5, 1], "itls": [[1.0, 1.0], []]}
    assert requests.of_client(seen) == [Request(0.5, pytest.approx(0.6), 2.9, 5), Request(0.2, None, 0.2, 1)]


def test_both_limits_must_be_kept() -> None:
    one = Request(0.5, 0.1, 2.0, 16)
    assert requests.within(one, ttft_s=0.5, tpot_s=0.1)
    assert not requests.within(one, ttft_s=0.4, tpot_s=0.1) and not requests.within(one, ttft_s=1, tpot_s=0.09)
