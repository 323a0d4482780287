"""The real server on a tiny bundle whose draft is the target itself: whatever is proposed must be accepted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.serve import check, launch, smoke
from quantkit.serve.settings import ServeSettings

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

MakeBundle = Callable[..., Path]
# float32: there the greedy answers of vLLM and transformers are equal token for token. In 16 bits a random model's two
# best logits may round to the same number, and the batch shape decides which one wins.
SETTINGS = ServeSettings(
    served_model_name="tiny",
    max_model_len=1024,
    max_num_seqs=4,
    max_num_batched_tokens=1024,
    num_speculative_tokens=4,
    kv_cache_memory_bytes=64 << 20,
    dtype="float32",
)
NUM_TOKENS = 40


class Running(NamedTuple):
    """A bundle and its server."""

    bundle: Path
    server: launch.Server


@pytest.fixture(scope="module")
def bundle(tiny_llama: Path, make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle below a folder whose name misleads vLLM, unless the paths are relative."""
    return make_bundle(tiny_llama, tmp_path_factory.mktemp("eagle3-project") / "bundle", SETTINGS)


@pytest.fixture(scope="module")
def running(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The server, started once: it takes a minute or more."""
    with launch.serving(bundle, profile="cpu", log=tmp_path_factory.mktemp("log") / "vllm.log") as server:
        yield Running(bundle, server)


@pytest.fixture(scope="module")
def probed(running: Running) -> smoke.SmokeResult:
    return smoke.probe(running.server.base_url, "tiny")


def test_every_check_passes(probed: smoke.SmokeResult) -> None:
    assert {one.name: one.detail for one in probed.checks if not one.passed} == {}


def test_a_target_accepts_all_of_its_own_proposals(probed: smoke.SmokeResult) -> None:
    assert probed.acceptance_rate == 1.0
    assert probed.accepted_length == 1 + 4


def test_streamed_chunks_are_fewer_than_tokens(probed: smoke.SmokeResult) -> None:
    assert 0 < probed.streamed_chunks < probed.completion_tokens


def test_answers_equal_those_without_speculation(running: Running, tiny_llama: Path) -> None:
    """Token for token what transformers says without any draft."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for prompt in smoke.PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            expected = model.generate(torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False)[0, len(ids) :]
        # No temperature: greedy is the bundle's default on a CPU.
        body = {"model": "tiny", "messages": messages, "max_tokens": NUM_TOKENS, "return_token_ids": True}
        with httpx.Client(trust_env=False, timeout=300) as client:
            answer = client.post(f"{running.server.base_url}/v1/chat/completions", json=body).raise_for_status().json()
        assert answer["prompt_token_ids"] == ids
        assert answer["choices"][0]["token_ids"] == expected.tolist()


def test_settings_reached_the_server(running: Running) -> None:
    with httpx.Client(base_url=running.server.base_url, trust_env=False, timeout=60) as client:
        served = client.get("/v1/models").json()["data"][0]
        assert (served["id"], served["max_model_len"], served["root"]) == ("tiny", 1024, "target")
        assert client.get("/docs").status_code == 404
        labels = next(line for line in client.get("/metrics").text.splitlines() if "cache_config_info{" in line)
    assert 'block_size="32"' in labels
    assert 'enable_prefix_caching="True"' in labels


def test_vllm_takes_good_flags_and_refuses_bad_ones(bundle: Path) -> None:
    """The check is vLLM's own: what it would refuse at start is refused here, and only that."""
    cpu = bundle / "vllm" / "serve.cpu.yaml"
    good = cpu.read_text()
    try:
        cpu.write_text(good.replace('dtype: "float32"', 'dtype: "float31"'))
        found = {one.name: one for one in check._vllm_checks(bundle)}  # the others find that bundle.json says otherwise
    finally:
        cpu.write_text(good)
    assert {name for name, one in found.items() if not one.passed} == {"vLLM accepts vllm/serve.cpu.yaml"}
    assert "float31" in found["vLLM accepts vllm/serve.cpu.yaml"].detail
    assert "a CPU build cannot tell" in found["vLLM accepts vllm/serve.yaml"].detail
