"""What a bench says of measurements that were made up: the right technique, the right word, the right plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit import speculation
from quantkit.bench import gains, page, results
from quantkit.bench.measure import Measured, Plan
from quantkit.bench.requests import Middle
from quantkit.bench.variants import parse

Make = Callable[..., tuple[Plan, Measured]]
SECONDS = {
    "fp16+serial": {1: 0.10, 8: 0.10}, "fp16": {1: 0.10, 8: 0.12}, "w4": {1: 0.05, 8: 0.12},
    "w4+draft": {1: 0.04, 8: 0.15}, "w4+draft+prefix": {1: 0.04, 8: 0.15},
}  # fmt: skip


def _told(made_up: Make, seconds: dict[str, dict[int, float]], **more: Any) -> dict[str, Any]:
    plan, measured = made_up(seconds)
    settings: dict[str, Any] = {"ttft_limit_s": 2.0, "tpot_limit_s": 0.13, "price_per_hour": 3.6, "left_out": {}}
    found = results.assemble(plan, measured, **settings | more)
    bundle = {"path": "bundle", "model": "tiny", "digests": {"target": "0" * 64}}
    return found | {"bundle": bundle, "baseline": "checkpoint"}


def _of(found: dict[str, Any], technique: str, concurrency: int) -> dict[str, Any]:
    (one,) = (g for g in found["gains"] if (g["technique"], g["concurrency"]) == (technique, concurrency))
    return dict(one)


def test_every_gain_goes_to_its_technique(made_up: Make) -> None:
    found = _told(made_up, SECONDS)
    weights = _of(found, "4-bit weights", 1)
    assert weights["verdict"] == "gain" and weights["ratios"]["tpot"]["value"] == pytest.approx(2)
    assert _of(found, "4-bit weights", 8)["verdict"] == "no difference shown"
    assert _of(found, "speculation", 1)["ratios"]["tpot"]["value"] == pytest.approx(1.25)
    lost = _of(found, "speculation", 8)
    assert lost["verdict"] == "loss" and "a step yields 2.00 tokens and takes 2.50 times as long" in lost["why"]
    prefix = _of(found, "prefix caching", 1)
    assert prefix["ratios"]["ttft"]["value"] == pytest.approx(10) and prefix["why"].startswith("80%")
    assert prefix["kind"] == "shared"


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((1.01, 1.3), "gain"), ((0.7, 0.99), "loss"), ((0.9, 1.3), "no difference shown"),
        (None, "no difference shown"),  # too few pairs for an interval
    ],
)  # fmt: skip
def test_a_difference_is_one_where_its_interval_says_so(interval: tuple[float, float] | None, verdict: str) -> None:
    assert gains._verdict(Middle(1.1, interval)) == verdict


def test_where_speculation_turns_negative_is_named(made_up: Make) -> None:
    found = _told(made_up, SECONDS)
    assert found["turns_negative"] == {"w4+draft": "at 8 at once (measured: 1, 8)"}
    always = _told(made_up, SECONDS | {"w4+draft": {1: 0.09, 8: 0.15}})
    assert always["turns_negative"]["w4+draft"] == "at every load: already 1 at once is slower with it"
    alone = _told(made_up, SECONDS | {"w4+draft": {1: 0.09, 8: 0.08}})
    assert alone["turns_negative"]["w4+draft"] == "at 1 at once (measured: 1, 8)"
    never = _told(made_up, SECONDS | {"w4+draft": {1: 0.04, 8: 0.08}})
    assert never["turns_negative"]["w4+draft"].startswith("nowhere")


def test_the_plan_that_a_bundle_reads(made_up: Make) -> None:
    """Two numbers of draft tokens: the better one at each load, and none where none pays."""
    seconds = SECONDS | {"w4+draft:1": {1: 0.045, 8: 0.10}}
    found = _told(made_up, seconds)
    plan = speculation.read({speculation.RESULTS_KEY: [found["speculation"]]})["cpu"]
    assert [load.tokens for load in plan.loads] == [3, 1]
    assert plan.loads[0].best.speedup == pytest.approx(1.25) and plan.accepted_length == [1.6, 1.9, 2.0]
    assert speculation.schedule(plan, max_num_seqs=16) == [(1, 1, 3), (2, 16, 1)]
    assert speculation.decide("auto", plan, max_num_seqs=16).tokens == 1  # a separate draft: one number for all loads
    by_load = speculation.decide("auto", plan, max_num_seqs=16, by_load=True)
    assert by_load.tokens == 3 and by_load.why.startswith("on by load")


def test_the_price_is_that_of_the_load_within_the_limits(made_up: Make) -> None:
    found = {one["variant"]: one for one in _told(made_up, SECONDS)["at_the_limits"]}
    assert found["w4"]["concurrency"] == 8 and found["w4+draft"]["concurrency"] == 1
    assert found["w4"]["price_per_million_tokens"] == pytest.approx(3.6 / (3600 * found["w4"]["tokens_per_s"]) * 1e6)
    assert _told(made_up, SECONDS, price_per_hour=None)["at_the_limits"][0]["price_per_million_tokens"] is None
    none = _told(made_up, SECONDS, tpot_limit_s=0.01)
    assert "no variant kept the limits" in page.summary(none)[-1]


def test_a_draft_that_never_proposed_has_no_plan(made_up: Make) -> None:
    plan, measured = made_up(SECONDS)
    for key, answer in list(measured.answers.items()):
        quiet = {name: value for name, value in answer.counted.items() if not name.startswith("spec_decode")}
        measured.answers[key] = answer._replace(counted=quiet)
    found = gains.cells(measured)
    told = gains.gains(found, measured, plan.bundle, plan.baseline)
    assert {gain.why for gain in told if gain.technique == "speculation"} == {"nothing was drafted"}
    assert gains.plan(found, told, plan.bundle, profile="cpu", machine="a machine") is None


def test_draft_tokens_of_a_bundle_are_those_of_its_settings(made_up: Make) -> None:
    plan, measured = made_up(SECONDS)
    found = gains.cells(measured)
    told = gains.gains(found, measured, plan.bundle, plan.baseline)
    made = gains.plan(found, told, plan.bundle, profile="cpu", machine="a machine")
    assert made is not None and [option.tokens for option in made.loads[0].options] == [3]
    without = {one: cells for one, cells in found.items() if one != parse("w4+draft")}
    assert gains.plan(without, told, plan.bundle, profile="cpu", machine="a machine") is None


def test_a_browser_shows_all_of_it(
    made_up: Make, see: Callable[[Path, str], list[dict[str, Any]]], tmp_path: Path
) -> None:
    path = tmp_path / "bench.html"
    path.write_text(page.html(_told(made_up, SECONDS, left_out={"w4+fp8": "there is none"})))
    assert len(see(path, "bench")) == 7


def test_the_pages_say_it(made_up: Make) -> None:
    found = _told(made_up, SECONDS, left_out={"w4+fp8": "no <AVX-512> | here"})
    html, markdown = page.html(found), page.markdown(found)
    for words in (
        "speculation turns negative at 8 at once",
        "a step yields 2.00 tokens",
        "8 at once, prompts of their own",
    ):
        assert words in html and words in markdown
    assert "no &lt;AVX-512&gt; | here" in html and "no <AVX-512> \\| here" in markdown
    assert html.count("<svg") == 7 and "<script" not in html and "http://www.w3.org" not in html.split("</style>")[0]
