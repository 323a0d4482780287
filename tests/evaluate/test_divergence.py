"""The streamed comparison against whole models of transformers, and the report made of it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.errors import QuantkitError
from quantkit.evaluate import divergence
from quantkit.evaluate.report import evaluate, summarize
from quantkit.progress import silent
from quantkit.recipe import Evaluate


@pytest.fixture(scope="module")
def other(make_llama, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """Another model of the same sizes: a candidate that is far off."""
    path: Path = make_llama(tmp_path_factory.mktemp("other") / "model", seed=5, initializer_range=0.9)
    return path


def _evaluate(candidate: Path, reference: Path, text: Path, out: Path, **settings: object) -> dict[str, object]:
    out.mkdir()
    checked = Evaluate.model_validate({"text": [str(text)], "samples": 3, "length": 48} | settings)
    return evaluate(
        candidate, reference, settings=checked, seed=0, calibrated_on=[], note="", out=out, folder=out, device="cpu",
        report=silent,
    )  # fmt: skip


def test_scores_equal_those_of_whole_models(
    tiny_llama: Path, other: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    windows = tokens.tokenize([str(texts[1])], tokens.load_tokenizer(tiny_llama), samples=3, length=48, seed=0)
    scores = divergence.compare(
        open_checkpoint(tiny_llama), open_checkpoint(other), windows, device="cpu", batch_size=2, folder=tmp_path,
        report=silent,
    )  # fmt: skip
    logprobs = []
    for path in (tiny_llama, other):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logprobs.append(model(windows.input_ids_ST).logits[:, :-1].log_softmax(-1))
    wanted = windows.input_ids_ST[:, 1:, None]
    for nll, logprob in zip((scores.reference_nll_ST, scores.candidate_nll_ST), logprobs, strict=True):
        torch.testing.assert_close(nll, -logprob.gather(-1, wanted)[..., 0], rtol=1e-4, atol=1e-4)
    kl = (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1)
    torch.testing.assert_close(scores.kl_ST, kl, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.same_top1_ST, logprobs[0].argmax(-1) == logprobs[1].argmax(-1))


def test_a_checkpoint_does_not_drift_from_itself(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    results = _evaluate(tiny_llama, tiny_llama, texts[1], tmp_path / "out")
    assert results["drift"] == {"value": 0.0, "standard_error": 0.0}
    assert results["top1_agreement"]["value"] == 1 and results["gates"][0]["passed"]  # type: ignore[index]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_the_gate_says_no(tiny_llama: Path, other: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    results = _evaluate(other, tiny_llama, texts[1], tmp_path / "out")
    assert not results["gates"][0]["passed"] and results["kl_nats"]["mean"] > 0.1  # type: ignore[index]
    assert "Failed" in (tmp_path / "out" / "report.html").read_text()


def test_a_candidate_of_another_size_is_refused(
    make_llama, tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    deeper = make_llama(tmp_path / "deeper", layers=3)
    with pytest.raises(QuantkitError, match="was not made from"):
        _evaluate(deeper, tiny_llama, texts[1], tmp_path / "out")


def test_text_that_was_calibrated_on_is_refused_by_its_words(
    tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    hidden = tmp_path / "same-words-other-bytes.txt"
    hidden.write_text("Preface. " + texts[1].read_text())
    checked = Evaluate.model_validate({"text": [str(texts[1])], "samples": 3, "length": 48})
    with pytest.raises(QuantkitError, match="also stands in the calibration text"):
        evaluate(
            tiny_llama, tiny_llama, settings=checked, seed=0, calibrated_on=[str(hidden)], note="", out=tmp_path,
            folder=tmp_path, device="cpu", report=silent,
        )  # fmt: skip


def test_kl_is_never_negative_and_positions_are_kept() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(7, 11), torch.randn(7, 11)
    nll_first, nll_second, kl, same = divergence.score_logits(first, second, torch.arange(7))
    assert (kl > 0).all() and nll_first.shape == nll_second.shape == same.shape == (7,)
    assert (
        summarize(divergence.Scores(*(t[None] for t in (nll_first, nll_second, kl, same))), 1.0)["scored_tokens"] == 7
    )
