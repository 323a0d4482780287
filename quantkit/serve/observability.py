"""What to watch of a served bundle: Prometheus rules, alerts with their tests, a Grafana dashboard."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from quantkit.serve import rendering
from quantkit.serve.settings import ServeSettings
from quantkit.serve.verdict import Check, ask_tool, of_problems
from quantkit.speculation import RESULTS_KEY, Plan, read

FOLDER = "observability"

# Every name of vLLM that rules and dashboard may use. A test finds each of them in /metrics of the real server.
METRICS = frozenset({
    "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket", "vllm:request_queue_time_seconds_bucket", "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:num_preemptions_total", "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
})  # fmt: skip
DRAFT_METRICS = frozenset({  # with speculation only
    "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
})  # fmt: skip

_QUANTILES = (
    ("ttft_seconds_p50", "vllm:time_to_first_token_seconds", 0.5),
    ("ttft_seconds_p95", "vllm:time_to_first_token_seconds", 0.95),
    ("itl_seconds_p50", "vllm:inter_token_latency_seconds", 0.5),
    ("itl_seconds_p95", "vllm:inter_token_latency_seconds", 0.95),
    ("e2e_seconds_p95", "vllm:e2e_request_latency_seconds", 0.95),
    ("queue_seconds_p95", "vllm:request_queue_time_seconds", 0.95),
)
# What is left of the acceptance at bundling when the alert fires: traffic is not the held-out prompts, and some is
# sampled at higher temperatures.
_DRIFT = 0.8


class Expected(NamedTuple):
    """Acceptance when the bundle was made, with the number of tokens that the GPU profile drafts.

    rate is accepted / proposed, length 1 + accepted / drafts.
    """

    tokens: int
    rate: float
    basis: str

    @property
    def length(self) -> float:
        """The accepted length."""
        return 1 + self.rate * self.tokens

    @property
    def floor(self) -> float:
        """The acceptance rate below which the alert fires."""
        return _DRIFT * self.rate


class Panel(NamedTuple):
    """A graph of the dashboard: (expression, legend) pairs, in a unit of Grafana's."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]


def files(settings: ServeSettings, record: Mapping[str, Any]) -> dict[str, str]:
    """Path in the bundle -> text."""
    tokens = settings.draft_tokens("gpu")
    expected = expected_acceptance(settings, record)
    alerts = ["FirstTokenLate", "TokensSlow", "KvCacheFull", "Preemptions", "RequestsWaiting"]
    alerts += ["PrefixesNotFound"] if settings.enable_prefix_caching else []
    alerts += ["AcceptanceDrift"] if expected else []
    values = {
        "settings": settings, "replicas": settings.replicas, "quantiles": _QUANTILES, "speculates": tokens > 0,
        "tokens": tokens, "expected": expected, "alerts": alerts,
    }  # fmt: skip
    rendered = {
        f"{FOLDER}/{name}": rendering.render(f"{FOLDER}/{name}.j2", **values)
        for name in ("prometheus.yml", "rules.yml", "rules_test.yml")
    }
    board = dashboard(settings.served_model_name, tokens > 0, expected)
    return rendered | {f"{FOLDER}/dashboard.json": json.dumps(board, indent=2) + "\n"}


def expected_acceptance(settings: ServeSettings, record: Mapping[str, Any]) -> Expected | None:
    """The acceptance on record for the GPU profile; None where nothing is drafted, or none was counted.

    vLLM's own counts, at the temperature where they are lowest, as whoever asks chooses the temperature. What a draft
    accepts at its first positions does not depend on how many follow, so counts of longer drafts serve too; where fewer
    positions were counted, the plan's figure does, which foretells the rest.
    """
    tokens = settings.draft_tokens("gpu")
    if not tokens:
        return None
    after = record["measured"].get("draft", {}).get("acceptance", {}).get("after", {})
    counted = [
        (sum(one["vllm"]["per_position"][:tokens]) / tokens, temperature)
        for temperature, one in after.items()
        if len(one.get("vllm", {}).get("per_position", ())) >= tokens
    ]
    if counted:
        rate, temperature = min(counted)
        found = Expected(tokens, rate, f"by vLLM on held-out prompts at temperature {temperature}")
    else:
        plan = _plan(record)
        if plan is None or len(plan.accepted_length) < tokens:
            return None
        found = Expected(tokens, (plan.accepted_length[tokens - 1] - 1) / tokens, "by the draft's plan, temperature 0")
    return found if found.rate > 0 else None


def _plan(record: Mapping[str, Any]) -> Plan | None:
    plans = read({RESULTS_KEY: list(record["speculation"]["plans"].values())})
    return plans.get("gpu")


def dashboard(model: str, speculates: bool, expected: Expected | None) -> dict[str, Any]:
    """The Grafana dashboard: one row of three graphs after another, of what the rules record."""
    each = "{{instance}}"
    panels = [
        Panel("Time to first token", "s", (
            ("quantkit:ttft_seconds_p50", f"{each} median"), ("quantkit:ttft_seconds_p95", f"{each} 95 %"))),
        Panel("Between two tokens", "s", (
            ("quantkit:itl_seconds_p50", f"{each} median"), ("quantkit:itl_seconds_p95", f"{each} 95 %"))),
        Panel("Tokens a second", "short", (
            ("quantkit:generated_tokens_per_second", f"{each} generated"),
            ("quantkit:prompt_tokens_per_second", f"{each} of prompts"))),
        Panel("KV cache in use", "percentunit", (("quantkit:kv_cache_usage", each),)),
        Panel("Requests", "short", (
            ("quantkit:requests_running", f"{each} running"), ("quantkit:requests_waiting", f"{each} waiting"))),
        Panel("Prefix cache: prompt tokens found", "percentunit", (("quantkit:prefix_hit_rate", each),)),
        Panel("Waiting before the first step, 95 %", "s", (("quantkit:queue_seconds_p95", each),)),
        Panel("Whole request, 95 %", "s", (("quantkit:e2e_seconds_p95", each),)),
        Panel("Preemptions a second", "short", (("quantkit:preemptions_per_second", each),)),
    ]  # fmt: skip
    if speculates:
        bundled = (
            {"rate": f"vector({expected.rate:.4g})", "length": f"vector({expected.length:.4g})"} if expected else {}
        )
        for title, unit, name in (
            ("Acceptance rate", "percentunit", "rate"), ("Accepted length", "short", "length"),
        ):  # fmt: skip
            recorded = {"rate": "quantkit:acceptance_rate", "length": "quantkit:accepted_length"}[name]
            then = ((bundled[name], "when bundled"),) if bundled else ()
            panels.append(Panel(title, unit, ((recorded, each), *then)))
    return {
        "uid": "quantkit",
        "title": f"{model} on vLLM",
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "panels": [_panel(panel, place) for place, panel in enumerate(panels)],
    }


def _panel(panel: Panel, place: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "prometheus"}
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": {"x": place % 3 * 8, "y": place // 3 * 8, "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": "ABCD"[n], "datasource": source, "expr": expr, "legendFormat": legend}
            for n, (expr, legend) in enumerate(panel.lines)
        ],
    }


def expressions(folder: Path) -> dict[str, str]:
    """Every PromQL expression of a bundle's rules and dashboard, by the name of what it is for.

    Raises:
        yaml.YAMLError, ValueError, KeyError, TypeError, OSError: a file is not there, or not what was written.
    """
    rules = yaml.safe_load((folder / "rules.yml").read_text(encoding="utf-8"))
    board = json.loads((folder / "dashboard.json").read_bytes())
    found = {
        rule.get("record") or f"alert {rule['alert']}": rule["expr"]
        for group in rules["groups"]
        for rule in group["rules"]
    }
    return found | {
        f"panel {panel['title']}, {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel["targets"]
    }


def checks(bundle: Path) -> list[Check]:
    """Only names that vLLM has, or that are recorded from them; and what promtool says, where it is here."""
    folder, install = bundle / FOLDER, "Debian package prometheus"
    asked = {
        "Prometheus settings and rules": ("check", "config", "prometheus.yml"),
        "alerts fire when they should, and only then": ("test", "rules", "rules_test.yml"),
    }
    return [
        of_problems("metric names", _name_problems(folder), good="each is one of vLLM's, or recorded from them"),
        *(ask_tool(name, ("promtool", *words), cwd=folder, install=install) for name, words in asked.items()),
    ]


def _name_problems(folder: Path) -> list[str]:
    try:
        found = expressions(folder)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return [f"{FOLDER} cannot be read ({type(error).__name__}: {error}): build the bundle again"]
    known = METRICS | DRAFT_METRICS | found.keys()
    return [
        f"{place}: {name} is neither one of vLLM's nor recorded"
        for place, expr in found.items()
        for name in re.findall(r"\b\w+:\w+", expr)
        if name not in known
    ]
