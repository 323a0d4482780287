"""A tiny bundle whose draft is its target, and a bench of it that was made up from known seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.bench import variants
from quantkit.bench.client import Answered
from quantkit.bench.measure import Measured, Plan, Served
from quantkit.bench.variants import Variant
from quantkit.bench.workload import Load
from quantkit.serve.settings import ServeSettings

MakeBundle = Callable[..., Path]
SETTINGS = ServeSettings(
    served_model_name="tiny", max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=1024,
    num_speculative_tokens=3, kv_cache_memory_bytes=64 << 20, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="session")
def bundle(tiny_llama: Path, make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target and draft are one checkpoint: whatever is proposed is accepted."""
    return make_bundle(tiny_llama, tmp_path_factory.mktemp("benched") / "bundle", SETTINGS)


def answered(*, ttft_s: float, tpot_s: float, requests: int, tokens: int, **counted: float) -> Answered:
    """What the client would have written of requests that all took this long, one of them a little longer."""
    latencies = [ttft_s + tpot_s * (tokens - 1) * (1 + 0.01 * (number == 0)) for number in range(requests)]
    client = {
        "ttfts": [ttft_s] * requests, "latencies": latencies, "output_lens": [tokens] * requests,
        "itls": [[tpot_s] * (tokens - 1)] * requests, "total_output_tokens": tokens * requests,
        "duration": max(latencies), "failed": 0,
    }  # fmt: skip
    return Answered(client, {"prompt_tokens": 40.0 * requests, **counted}, 0.1)


@pytest.fixture
def made_up(bundle: Path, tiny_llama: Path) -> Callable[..., tuple[Plan, Measured]]:
    """A plan and its measurements: seconds a token by variant and requests at once."""

    def make(tpot_s: dict[str, dict[int, float]], *, rounds: int = 3) -> tuple[Plan, Measured]:
        names: list[Variant] = [variants.parse(name) for name in tpot_s]
        loads = [
            Load(kind, 0.0, concurrency, number)
            for number in range(rounds)
            for kind in ("unique", "shared")
            for concurrency in next(iter(tpot_s.values()))
        ]
        plan = Plan(bundle, tiny_llama, "cpu", names, loads, ["a"], "b", 16, 8, True)
        measured = Measured({one: Served({}, [], 1.0) for one in names}, {}, {"unique": "vllm bench serve"}, {})
        for one in names:
            for load in loads:
                if not plan.asked_of(one, load):
                    continue
                counted = {"prefix_cache_queries": 100.0, "prefix_cache_hits": 80.0} if one.prefix else {}
                if one.speculation:
                    drafts = {"spec_decode_num_drafts": 100.0, "spec_decode_num_draft_tokens": 300.0}
                    name = "spec_decode_num_accepted_tokens_per_pos"
                    places = {f"{name}@{place}": each for place, each in enumerate((60.0, 30.0, 10.0))}
                    counted |= drafts | {"spec_decode_num_accepted_tokens": 100.0} | places
                ttft_s = 0.05 if one.prefix else 0.5
                measured.answers[one, load] = answered(
                    ttft_s=ttft_s, tpot_s=tpot_s[one.name][load.concurrency], requests=8, tokens=16, **counted
                )
        return plan, measured

    return make
