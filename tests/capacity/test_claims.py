"""The table of claims for Llama-2-70B on one H100, and that other numbers come to other words."""

from pathlib import Path

import yaml

from quantkit.capacity import subject, tables
from quantkit.capacity.claims import Judged

RECIPE = Path(__file__).parents[2] / "recipes" / "llama-2-70b-h100.yaml"


def _judged(path: Path = RECIPE, **given: object) -> dict[str, Judged]:
    return {one.claim: one for one in subject.plan(path, gpu=None, given=given).judged}


def test_every_claim_of_the_recipe() -> None:
    found = _judged()
    assert {name: one.verdict for name, one in found.items()} == {
        "TTFT before": "not on one GPU",
        "TTFT after": "not at this context",
        "tokens/s before": "not on one GPU",
        "tokens/s after": "not both at once",
        "users before": "not on one GPU",
        "users after": "plausible",
        "$ a 1M tokens": "implies two GPU prices",
        "perplexity drift": "needs measuring",
        "acceptance": "needs measuring",
        "KV cache at 4096 tokens": "of all users, not of one",
    }
    assert "138.0 GB of 16-bit weights, 78.7 GB usable" in found["TTFT before"].arithmetic
    # 2 operations for each of 68.7 thousand million weights (the embedding is looked up) at 989e12 a second
    assert "at most 323 tokens are read" in found["TTFT after"].arithmetic
    assert "$0.28 before and $0.15 after" in found["$ a 1M tokens"].arithmetic
    assert "$1.13 before and $4.84 after" in found["$ a 1M tokens"].arithmetic
    assert "1.25 GiB for one sequence" in found["KV cache at 4096 tokens"].arithmetic
    assert "40 GiB are 32 sequences, 64 in FP8" in found["KV cache at 4096 tokens"].arithmetic
    assert "2.94 tokens a step" in found["acceptance"].arithmetic


def test_the_documentation_has_what_the_command_prints() -> None:
    answer = subject.plan(RECIPE, gpu=None, given={})
    said = tables.markdown(*answer)
    table = said[said.index("## Claims") :].split("\n\n")[1]
    assert table in (RECIPE.parents[1] / "docs" / "plan.md").read_text()


def test_other_numbers_come_to_other_words(tmp_path: Path) -> None:
    data = yaml.safe_load(RECIPE.read_text())
    data["plan"] |= {"gpu": "h200:2", "answer_tokens": 3840}
    data["plan"]["claims"] = {
        "ttft_ms": {"before": 480, "after": 45}, "tokens_per_s": {"before": 28, "after": 50}, "users": {"after": 300},
        "price_per_1m_tokens": {"before": 2.0, "after": 1.12}, "kv_cache_gb": {"after": 1.25},
    }  # fmt: skip
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(data))
    assert {name: one.verdict for name, one in _judged(path).items()} == {
        "TTFT before": "plausible", "TTFT after": "plausible", "tokens/s before": "plausible",
        "tokens/s after": "not both at once", "users after": "does not fit",
        "$ a 1M tokens": "plausible", "KV cache at 4096 tokens": "plausible",
    }  # fmt: skip
