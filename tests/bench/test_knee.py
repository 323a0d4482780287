"""guidellm's search for the knee: what it is asked, what is read of its answer, and that it is missed in words."""

from pathlib import Path

import pytest

from quantkit.bench import knee
from quantkit.errors import QuantkitError


@pytest.mark.parametrize(
    ("most", "tried"), [(1, [1, 2, 3, 4, 5]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_it_tries_five_loads_at_least(most: int, tried: list[int]) -> None:
    assert knee.streams(most) == tried


def test_it_reads_the_conclusion_and_the_points() -> None:
    point = {
        "request_concurrency": {"successful": {"mean": 4.0}},
        "output_tokens_per_second": {"successful": {"mean": 9.5}},
    }
    final = {"throughput": {"status": "ok", "reason": "a flatter tail", "knee": 4.2, "tail_slope": 0.1}}
    told = {"conclusions": [{"kind": "knee_detection", "final": final}], "benchmarks": [{"metrics": point}]}
    assert knee.read(told) == {
        "status": "ok", "reason": "a flatter tail", "knee": 4.2, "points": [{"concurrency": 4.0, "tokens_per_s": 9.5}],
    }  # fmt: skip


def test_without_guidellm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QuantkitError, match="guidellm is not here: install it"):
        knee.find()
