"""The streamed comparison against whole models of transformers; what the cache and the padding change: nothing."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.conversations import Exchange
from quantkit.evaluate import divergence, measures, windows
from quantkit.evaluate.divergence import Scores
from quantkit.evaluate.windows import Windows
from quantkit.progress import Report, silent


def _compare(
    reference: Path, candidate: Path, read: Windows, folder: Path, report: Report = silent
) -> tuple[Scores, list[float]]:
    first, second = open_checkpoint(reference), open_checkpoint(candidate)
    states = [
        divergence.read(each, read, folder / f"{number}.safetensors", device="cpu", what="", report=report)
        for number, each in enumerate((first, second))
    ]
    scores = divergence.compare(first, second, (states[0], states[1]), read, device="cpu", report=silent)
    return scores, divergence.by_layer(states[0], states[1])


@pytest.fixture(scope="module")
def passages(tiny_llama: Path, texts: tuple[Path, Path]) -> Windows:
    found = tokens.tokenize([str(texts[1])], tokens.load_tokenizer(tiny_llama), samples=3, length=48, seed=0)
    return windows.of_passages(found)


def test_scores_equal_those_of_whole_models(
    tiny_llama: Path, drifted_llama: Path, passages: Windows, tmp_path: Path
) -> None:
    scores, layers = _compare(tiny_llama, drifted_llama, passages, tmp_path)
    logprobs, states = [], []
    for path in (tiny_llama, drifted_llama):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.model.norm = torch.nn.Identity()  # so that the last states are those of the last layer
        with torch.no_grad():
            said = model(passages.input_ids_ST, output_hidden_states=True)
            whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(passages.input_ids_ST)
        logprobs.append(whole.logits[:, :-1].flatten(0, 1).log_softmax(-1))
        states.append([layer[0, 1:] for layer in said.hidden_states[1:]])
    wanted = passages.input_ids_ST[:, 1:].flatten()[:, None]
    for nll, logprob in zip((scores.reference_nll_N, scores.candidate_nll_N), logprobs, strict=True):
        torch.testing.assert_close(nll, -logprob.gather(-1, wanted)[:, 0], rtol=1e-4, atol=1e-4)
    kl = (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1)
    torch.testing.assert_close(scores.kl_N, kl, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.same_top1_N, (logprobs[0].argmax(-1) == logprobs[1].argmax(-1)).float())
    best = [[set(row.topk(5).indices.tolist()) for row in logprob] for logprob in logprobs]
    shared = [len(ours & theirs) / 5 for ours, theirs in zip(*best, strict=True)]
    assert scores.same_top5_N.tolist() == pytest.approx(shared)
    assert layers == pytest.approx(
        [float((ours - theirs).norm() / ours.norm()) for ours, theirs in zip(*states, strict=True)], rel=1e-3
    )


def test_padding_and_overlap_change_no_score(tiny_llama: Path, drifted_llama: Path, tmp_path: Path) -> None:
    exchanges = [Exchange([0, 9, 8], [20, 21, 22, 23, 24, 25]), Exchange([0, 7], [30, 31])]
    together, _ = _compare(tiny_llama, drifted_llama, windows.of_exchanges(exchanges), tmp_path / "together")
    for number, exchange in ((0, exchanges[1]), (1, exchanges[0])):
        alone, _ = _compare(tiny_llama, drifted_llama, windows.of_exchanges([exchange]), tmp_path / str(number))
        mine = together.sequence_N == number
        torch.testing.assert_close(together.kl_N[mine], alone.kl_N, rtol=1e-4, atol=1e-5)
        assert together.position_N[mine].tolist() == alone.position_N.tolist()


def test_what_was_read_is_not_read_again(
    tiny_llama: Path, drifted_llama: Path, passages: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first, _ = _compare(tiny_llama, drifted_llama, passages, tmp_path, lambda what, done, total: said.append(what))
    assert said
    said.clear()
    again, _ = _compare(tiny_llama, drifted_llama, passages, tmp_path, lambda what, done, total: said.append(what))
    assert not said and torch.equal(first.kl_N, again.kl_N)
    monkeypatch.setattr(divergence, "_IN_MEMORY", 0)  # states that do not fit memory go through a file
    spilled, _ = _compare(tiny_llama, drifted_llama, passages, tmp_path / "spilled")
    assert torch.equal(first.kl_N, spilled.kl_N)
    assert sorted(path.suffix for path in (tmp_path / "spilled").iterdir()) == [".safetensors"] * 2


def test_a_name_is_of_the_checkpoint_and_of_what_is_scored(passages: Windows) -> None:
    name = divergence.name_of("a", passages, "cpu")
    other_scored = passages._replace(scored_ST=~passages.scored_ST)
    assert name == divergence.name_of("a", passages._replace(stride=1), "cpu")
    assert len({name, divergence.name_of("b", passages, "cpu"), divergence.name_of("a", other_scored, "cpu")}) == 3


def test_kl_is_never_negative_and_a_model_does_not_diverge_from_itself() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(7, 11), torch.randn(7, 11)
    nll, theirs, kl, same, shared = divergence.score_logits(first.clone(), second, torch.arange(7))
    assert (kl > 0).all() and nll.shape == theirs.shape == same.shape == shared.shape == (7,)
    nll, theirs, kl, same, shared = divergence.score_logits(first.clone(), first, torch.arange(7))
    assert kl.abs().max() < 1e-6 and torch.equal(nll, theirs) and same.all() and (shared == 1).all()


def test_measures_are_those_of_the_tokens() -> None:
    torch.manual_seed(0)
    count = 400
    kl, nll = torch.rand(count) ** 4, torch.rand(count) * 5
    position = torch.arange(count) % 100 + 1
    scores = Scores(
        nll, nll + 0.1, kl, torch.ones(count), torch.full((count,), 0.8), torch.arange(count) // 100, position
    )
    found = measures.summarize(scores)
    assert found["drift"]["value"] == pytest.approx(torch.tensor(0.1).expm1().item(), rel=1e-5)
    assert found["drift_by_sequence"] == pytest.approx([torch.tensor(0.1).expm1().item()] * 4, rel=1e-4)
    assert found["kl_nats"]["value"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found["kl_nats"]["p99"] == pytest.approx(float(kl.sort().values[395]))
    assert found["top1_agreement"]["value"] == 1 and found["top5_agreement"]["value"] == pytest.approx(0.8)
    assert sum(found["kl_nats"]["histogram"]["counts"]) == count
    begins = [begin for begin, _ in found["kl_nats"]["by_position"]]
    assert begins == [1, 16, 32, 64]
    late = (position >= 64) & (position < 128)
    assert found["kl_nats"]["by_position"][-1][1] == pytest.approx(float(kl[late].mean()), rel=1e-5)
    assert found["perplexity_by_position"][-1][1] == pytest.approx(float(nll[late].mean().exp()), rel=1e-5)


def test_perplexity_of_whole_documents_is_lm_evals(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lines = [line for line in texts[1].read_text()[:1500].replace(" wind ", "\n").splitlines() if line]
    for number, line in enumerate(lines):
        (tmp_path / f"{number:03d}.txt").write_text(line)
    model = HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32", max_length=32, batch_size=4)
    asked = [Instance("loglikelihood_rolling", {}, (line,), 0) for line in lines]
    theirs = -torch.tensor(model.loglikelihood_rolling(asked, disable_tqdm=True), dtype=torch.float64)
    tokenizer = tokens.load_tokenizer(tiny_llama)
    read = windows.of_documents([str(tmp_path)], tokenizer, length=32, stride=32)
    scores, _ = _compare(tiny_llama, tiny_llama, read, tmp_path / "states")
    ours = torch.zeros(len(lines), dtype=torch.float64)
    ours.index_add_(0, scores.sequence_N, scores.reference_nll_N.double())
    counted = [len(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in lines]
    assert len(lines) > 5 and max(counted) > 64 and scores.sequence_N.bincount().tolist() == counted
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
