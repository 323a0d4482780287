"""Rules, alerts and dashboard: what is in them for which bundle, and what a check makes of spoiled ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.serve import observability, verdict
from quantkit.serve.settings import ServeSettings

SETTINGS = ServeSettings(served_model_name="tiny", max_model_len=1024, max_num_seqs=8, num_speculative_tokens=3)
ALERTS = (
    "ReplicaDown", "FirstTokenLate", "TokensSlow", "KvCacheFull", "Preemptions", "RequestsWaiting", "PrefixesNotFound",
    "AcceptanceDrift",
)  # fmt: skip
NO_PROMTOOL = pytest.mark.skipif(
    verdict.find_tool("promtool") is None, reason="not installed: Debian package prometheus"
)


def record(per_position: list[float] | None = None, planned: list[float] | None = None) -> dict[str, Any]:
    """The parts of bundle.json that are read: acceptance as the draft's manifest and its plan have it."""
    counted = {
        "0": {"vllm": {"per_position": [0.9] * len(per_position or ())}},
        "0.7": {"vllm": {"per_position": per_position}},
    }
    load = {"concurrency": 1, "step_s": 0.01, "options": [{"tokens": 1, "speedup": 1.0, "standard_error": 0.0}]}
    plan = {
        "profile": "gpu", "origin": "estimated", "machine": "an H100", "context_tokens": 32, "measured_positions": 1,
        "accepted_length": planned, "accepted_length_standard_error": planned, "loads": [load],
    }  # fmt: skip
    return {
        "measured": {"draft": {"acceptance": {"after": counted}}} if per_position else {},
        "speculation": {"plans": {"gpu": plan} if planned else {}},
    }


def write(folder: Path, given: dict[str, Any] | None = None, **changes: Any) -> Path:
    for name, text in observability.files(SETTINGS.model_copy(update=changes), given or record()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def problems(folder: Path) -> dict[str, str]:
    return {one.name: one.detail for one in observability.checks(folder) if not one.passed}


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        (record(), {}),
        (record([0.7, 0.5, 0.3, 0.1]), {}),
        (record(), {"num_speculative_tokens": None, "enable_prefix_caching": False, "replicas": 1}),
        (record([0.25, 0.0, 0.0]), {"ttft_limit_s": 0.75, "itl_limit_s": 0.03, "max_num_seqs": 256}),
    ],
)  # fmt: skip
def test_what_is_written_passes_every_check(tmp_path: Path, given: dict[str, Any], changes: dict[str, Any]) -> None:
    """Where promtool is here, its own tests of the alerts are among them."""
    assert problems(write(tmp_path, given, **changes)) == {}


def test_the_acceptance_that_was_counted_is_what_drift_is_held_against(tmp_path: Path) -> None:
    """The lowest temperature's counts, of as many positions as are drafted: (0.7 + 0.5 + 0.3) / 3."""
    write(tmp_path, record([0.7, 0.5, 0.3, 0.1]))
    text = (tmp_path / "observability" / "rules.yml").read_text()
    assert "by vLLM on held-out prompts at temperature 0.7: acceptance rate 0.5,\n      # accepted length 2.5." in text
    assert observability.expressions(tmp_path / "observability")["alert AcceptanceDrift"] == (
        "quantkit:acceptance_rate < 0.4"
    )


def test_where_fewer_positions_were_counted_the_plan_says(tmp_path: Path) -> None:
    found = observability.expected_acceptance(SETTINGS, record([0.7], planned=[1.7, 1.9, 2.2]))
    assert found is not None
    assert (found.rate, found.basis) == (pytest.approx(0.4), "by the draft's plan, temperature 0")
    assert found.length == pytest.approx(2.2)


@pytest.mark.parametrize("given", [record(), record([0.0, 0.0, 0.0]), record(planned=[1.5])])
def test_without_a_figure_there_is_no_drift(tmp_path: Path, given: dict[str, Any]) -> None:
    found = observability.expressions(write(tmp_path, given) / "observability")
    assert {name.removeprefix("alert ") for name in found if name.startswith("alert")} == {*ALERTS} - {
        "AcceptanceDrift"
    }


def test_without_speculation_nothing_asks_for_its_counters(tmp_path: Path) -> None:
    write(tmp_path, num_speculative_tokens=None)
    for path in (tmp_path / "observability").iterdir():
        assert "spec_decode" not in path.read_text() and "accept" not in path.read_text().lower()


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("rules.yml", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "vllm:gpu_cache_usage_perc is neither"),
        ("rules.yml", "expr: quantkit:kv_cache_usage", "expr: quantkit:kv_use", "quantkit:kv_use is neither"),
        ("dashboard.json", "quantkit:ttft_seconds_p95", "quantkit:ttft_p95", "panel Time to first token, B: quantkit"),
        ("dashboard.json", "{", "", "cannot be read"),
        ("rules.yml", "groups:", "group:", "cannot be read"),
    ],
)  # fmt: skip
def test_a_name_that_nobody_has_is_refused(tmp_path: Path, file: str, old: str, new: str, words: str) -> None:
    path = write(tmp_path) / "observability" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert words in problems(tmp_path)["metric names"]


@NO_PROMTOOL
@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_that_never_fires_is_seen(tmp_path: Path, alert: str) -> None:
    path = write(tmp_path, record([0.7, 0.5, 0.3])) / "observability" / "rules.yml"
    rules = yaml.safe_load(path.read_text())
    one = next(rule for rule in rules["groups"][1]["rules"] if rule["alert"] == alert)
    one["expr"] = f"({one['expr']}) and on () vector(1) < 0"
    path.write_text(yaml.safe_dump(rules))
    said = problems(tmp_path)["alerts fire when they should, and only then"]
    assert said.count(f'alertname="{alert}"') == 1  # expected and not seen; all others are both


@NO_PROMTOOL
def test_an_alert_that_fires_too_early_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path) / "observability" / "rules.yml"
    path.write_text(path.read_text().replace("kv_cache_usage > 0.95", "kv_cache_usage > 0.9"))
    said = problems(tmp_path)["alerts fire when they should, and only then"]
    assert 'alertname="KvCacheFull", alertstate="firing", instance="good"' in said


@NO_PROMTOOL
def test_a_rule_that_prometheus_cannot_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / "observability" / "rules.yml"
    path.write_text(path.read_text().replace("max by (instance", "max over (instance"))
    assert "parse error" in problems(tmp_path)["Prometheus settings and rules"]
