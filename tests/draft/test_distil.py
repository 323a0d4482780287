"""`train-draft` and what is wrong before any work: each mistake in a line that names it and the remedy."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit import conversations
from quantkit.cli import main
from quantkit.conversations import Exchange
from quantkit.draft import distil
from quantkit.errors import QuantkitError
from quantkit.offline import Session
from quantkit.progress import Report, silent


def _refusal(target: Path, out: Path, *words: object) -> str:
    """What `train-draft` says and writes nothing."""
    called = CliRunner().invoke(main, ["train-draft", str(target), "--out", str(out), *map(str, words)])
    assert called.exit_code == 2 and not any(out.glob("*.safetensors")), called.output
    return " ".join(called.stderr.split())


def test_a_draft_of_another_vocabulary_is_refused_by_both_sizes(make_llama, tiny_llama: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    smaller = make_llama(tmp_path / "smaller", layers=1, vocab_size=300)
    said = _refusal(tiny_llama, tmp_path / "out", "--init", smaller)
    assert "a vocabulary of 300 tokens and the target one of 320" in said
    assert "choose a smaller checkpoint of the target's own family" in said


def test_a_draft_with_another_tokenizer_of_the_same_size_is_refused(
    make_llama, tiny_llama: Path, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    other = make_llama(tmp_path / "other", layers=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = [word for word, number in words.items() if number in (300, 301)]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "have different tokenizers" in _refusal(tiny_llama, tmp_path / "out", "--init", other)


def test_prompts_and_answers_that_leave_no_context_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    said = _refusal(tiny_llama, tmp_path / "out", "--keep-layers", 1, "--prompt-tokens", 1500, "--answer-tokens", 600)
    assert "do not fit the target's context of 2048: lower draft.prompt_tokens or draft.answer_tokens" in said


def test_as_many_layers_as_the_target_has_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    assert "the target has 2 layers, a draft needs fewer" in _refusal(tiny_llama, tmp_path / "out", "--keep-layers", 2)


def test_a_path_that_vllm_would_misread_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    said = _refusal(tiny_llama, tmp_path / "my-eagle3-try" / "draft", "--keep-layers", 1)
    assert "vLLM would take the draft for another kind of speculator: choose another --out" in said


def test_a_base_model_cannot_ask_itself(tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "chat_template.jinja").unlink()
    said = _refusal(base, tmp_path / "out", "--keep-layers", 1, "--prompts", "self:60")
    assert "has no chat template" in said and "give prompts from a file" in said


def _prompts(target: Path, file: Path, folder: Path, report: Report = silent, *, longest: int = 12) -> list[list[int]]:
    with Session() as session:  # asked nothing: the prompts come from a file
        return conversations.prompts(
            session, str(file), target, purpose=conversations.Purpose.DRAFT, longest=longest, seed=0, folder=folder,
            report=report, held_out=2,
        )  # fmt: skip


def test_prompts_that_are_too_long_or_come_twice_are_left_out_and_counted(tiny_llama: Path, tmp_path: Path) -> None:
    file, lines = tmp_path / "prompts.jsonl", ["one", "two", "TWO", "three", "four", "the harbour of the town " * 20]
    file.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    said: list[str] = []
    found = _prompts(tiny_llama, file, tmp_path, lambda what, done, total: said.append(what))
    assert len(found) == 4 and all(len(prompt) < 30 for prompt in found)
    assert said == ["of 6 prompts 1 came twice and 1 had more than 12 tokens: they are left out"]


def test_too_few_prompts_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "the harbour of the town " * n}) + "\n" for n in range(1, 9)))
    with pytest.raises(QuantkitError, match="1 distinct ones of at most 12 tokens are left, and 2 are held out"):
        _prompts(tiny_llama, file, tmp_path)


def test_lessons_are_all_but_what_every_prompt_begins_with() -> None:
    taught = distil.lessons([Exchange([0, 7, 8, 1], [5]), Exchange([0, 7, 9], [6, 2])])
    assert taught == [Exchange([0, 7], [8, 1, 5]), Exchange([0, 7], [9, 6, 2])]
    assert distil.lessons([Exchange([3, 4], [5]), Exchange([4], [6])])[0] == Exchange([3], [4, 5])
