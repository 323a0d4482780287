"""A whole evaluation: what is reported, what is refused, and what a second candidate costs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quantkit import hardware
from quantkit.cli import main
from quantkit.evaluate import divergence


def _eval(*words: object, out: Path) -> tuple[int, str, dict[str, Any]]:
    called = CliRunner().invoke(main, ["eval", *map(str, words), "--out", str(out)])
    report = json.loads((out / "report.json").read_text()) if (out / "report.json").exists() else {}
    return called.exit_code, " ".join(called.stderr.split()), report


@pytest.fixture
def asked(tiny_llama: Path, texts: tuple[Path, Path]) -> list[object]:
    """Options of a small evaluation."""
    return ["--reference", tiny_llama, "--text", texts[1], "--samples", 3, "--length", 48, "--chat", "no"]


def test_a_checkpoint_does_not_drift_from_itself(tiny_llama: Path, asked: list[object], tmp_path: Path) -> None:
    code, said, report = _eval(tiny_llama, *asked, out=tmp_path / "out")
    assert code == 0 and report["verdict"] == "passed", said
    (found,) = report["candidates"]
    assert found["on"]["text"]["drift"]["value"] == 0 and found["on"]["text"]["top1_agreement"]["value"] == 1
    assert found["by_layer"] == [0, 0] and found["bits_per_weight"] == pytest.approx(32, rel=0.1)
    assert report["sets"]["text"] == {
        "sources": [str(asked[3])], "sequences": 3, "scored_tokens": 141, "window_tokens": 48, "stride": 48,
        "adds_bos": False,
    }  # fmt: skip
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_the_gate_says_no(tiny_llama: Path, drifted_llama: Path, asked: list[object], tmp_path: Path) -> None:
    code, said, report = _eval(drifted_llama, *asked, out=tmp_path / "out")
    assert code == 8 and "must not be served: KL on text is" in said and report["verdict"] == "failed"


def test_a_task_that_is_none_is_refused_before_any_work(tiny_llama: Path, asked: list[object], tmp_path: Path) -> None:
    code, said, _ = _eval(tiny_llama, *asked, "--task", "everydai", out=tmp_path / "out")
    assert code == 2 and "everydai is no task of lm-eval (did you mean everyday" in said and "reads" not in said


def test_a_draft_that_is_none_is_refused_before_any_work(tiny_llama: Path, asked: list[object], tmp_path: Path) -> None:
    code, said, _ = _eval(tiny_llama, *asked, "--draft", tiny_llama, out=tmp_path / "out")
    assert code == 2 and "has no manifest: give the --out of `quantkit train-draft`" in said and "reads" not in said


def test_too_little_text_is_no_verdict(
    tiny_llama: Path, drifted_llama: Path, asked: list[object], tmp_path: Path
) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("perplexity_drift: 2%\n")
    words = [tiny_llama, *asked, "--profile", profile]
    words[words.index("--samples") + 1] = 1
    code, said, report = _eval(*words, out=tmp_path / "out")
    assert code == 9 and "can not be judged yet" in said and "Raise evaluate.samples" in said
    assert report["verdict"] == "undecided" and report["gates"][0]["interval"] is None


def test_candidates_stand_beside_one_another_and_the_reference_reads_once(
    tiny_llama: Path, asked: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(tiny_llama, twin)
    layers: list[str] = []
    forward = divergence.decoder.layer
    monkeypatch.setattr(divergence.decoder, "layer", lambda *given: layers.append("") or forward(*given))
    code, said, _ = _eval(tiny_llama, twin, *asked, out=tmp_path / "none")
    assert code == 2 and "give --compare" in said
    code, said, report = _eval("--compare", tiny_llama, twin, *asked, "--kv-cache", "auto", "--kv-cache", "fp8",
                               "--profile", "none", out=tmp_path / "out")  # fmt: skip
    assert code == 0, said
    names = [(each["name"], each["kv_cache"]) for each in report["candidates"]]
    assert names == [("model", "auto"), ("model", "fp8"), ("twin", "auto"), ("twin", "fp8")]
    kl = [each["on"]["text"]["kl_nats"]["value"] for each in report["candidates"]]
    assert kl[0] == kl[2] == 0 and kl[1] == kl[3] > 0
    # Two layers, one batch: the reference once, four candidates; and a layer's cache alone, then the other's beside.
    passes = 2 * (1 + 4) + 2 * (2 + 3)
    assert len(layers) == passes
    cost = [each["cache"] for each in report["candidates"]]
    assert cost[0] is None and cost[1]["scales"] == "1.0, uncalibrated"
    assert cost[1]["on"]["text"]["kl_nats"]["value"] == pytest.approx(kl[1], rel=1e-5)
    assert len(cost[1]["by_layer"]["kl_nats"]) == 2 and min(cost[1]["by_layer"]["kl_nats"]) > 0
    code, _, _ = _eval(twin, *asked, "--profile", "none", out=tmp_path / "later")
    assert code == 0 and len(layers) == passes + 2, "the reference's pass was kept"


def test_whole_documents_are_scored_as_lm_eval_does(tiny_llama: Path, asked: list[object], tmp_path: Path) -> None:
    words = [tiny_llama, *asked, "--profile", "none", "--stride", 24]
    words[words.index("--samples") + 1] = "all"
    code, said, report = _eval(*words, out=tmp_path / "out")
    assert code == 0, said
    found = report["sets"]["text"]
    assert (found["stride"], found["window_tokens"], found["adds_bos"]) == (24, 49, True)
    assert found["scored_tokens"] > 3000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("embeddings", "the embeddings of 64 tokens differ by"), ("bos", "its tokenizer adds a BOS to a text, the"),
        ("template", "it has no chat template, the reference has one"), ("layers", "configs differ in size or kind"),
    ],
)  # fmt: skip
def test_a_candidate_that_is_no_kin_is_refused(
    change: str, said: str, make_llama, tiny_llama: Path, asked: list[object], tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    candidate = tmp_path / "candidate"
    if change == "layers":
        make_llama(candidate, layers=3)
    else:
        shutil.copytree(tiny_llama, candidate)
    if change == "embeddings":
        shutil.copy(make_llama(tmp_path / "stranger", seed=5) / "model.safetensors", candidate)
    if change == "bos":
        tokenizer = json.loads((candidate / "tokenizer.json").read_text())
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing", "pair": [{"Sequence": {"id": each, "type_id": 0}} for each in "AB"],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }  # fmt: skip
        (candidate / "tokenizer.json").write_text(json.dumps(tokenizer))
    if change == "template":
        (candidate / "chat_template.jinja").unlink()
    code, told, _ = _eval(candidate, *asked, out=tmp_path / "out")
    assert code == 2 and said in told and f"was not made from {tiny_llama}" in told


@pytest.mark.skipif(not hardware.lacks_avx512(), reason="this processor can keep an FP8 cache")
def test_a_cache_that_vllm_can_not_keep_is_refused_before_any_work(
    tiny_llama: Path, asked: list[object], tmp_path: Path
) -> None:
    code, said, _ = _eval(tiny_llama, *asked, "--served", "--kv-cache", "fp8", out=tmp_path / "out")
    assert code == 2 and "on processors with AVX-512 alone: leave out --served" in said and "reads" not in said


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_vllm_reads_the_same_tokens_and_the_reference_writes_chats(
    tiny_llama: Path, asked: list[object], tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"Count to {number}."}) + "\n" for number in range(4)))
    words = [tiny_llama, *asked, "--served", "--profile", "none", "--chat-tokens", 16]
    words[words.index("--chat") + 1] = chats
    code, said, report = _eval(*words, out=tmp_path / "out")
    assert code == 0, said
    (found,) = report["candidates"]
    assert report["sets"]["chat"]["sequences"] == 4
    for kind in ("text", "chat"):
        assert found["served"][kind]["drift"]["value"] == 0
        assert abs(found["served"][kind]["gap_nats"]["value"]) < 0.02
        assert found["served"][kind]["sequences"] == report["sets"][kind]["sequences"]
