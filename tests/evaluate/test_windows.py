"""Windows: every token scored once, as lm-eval does it."""

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows

from quantkit import tokens
from quantkit.conversations import Exchange
from quantkit.evaluate import windows
from quantkit.tokens import TokenSet


@pytest.mark.parametrize("length", [8, 16])
@pytest.mark.parametrize("context", [1, 5, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 41])
def test_rolling_windows_are_those_of_lm_eval(count: int, context: int, length: int) -> None:
    ids = list(range(100, 100 + count))
    found = list(windows.rolling(ids, 1, length=length, stride=length - context + 1))
    theirs = list(get_rolling_token_windows(ids, prefix_token=1, max_seq_len=length, context_len=context))
    assert [ids[1:][-scored:] for ids, scored in found] == [scored for _, scored in theirs]
    assert [ids[:-1] for ids, _ in found] == [given for given, _ in theirs]


def test_documents_are_sequences_and_every_token_counts_once(tiny_llama, tmp_path) -> None:  # type: ignore[no-untyped-def]
    lines = ["one two three four five six seven", "harbour", "the wind blows from the west when no ship can leave it"]
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.txt").write_text(line)
    tokenizer = tokens.load_tokenizer(tiny_llama)
    found = windows.of_documents([str(tmp_path)], tokenizer, length=12, stride=5)
    sizes = [len(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in lines]
    scored = [int(found.scored_ST[found.sequence_S == number].sum()) for number in range(len(lines))]
    assert scored == sizes and found.adds_bos
    firsts = [int((found.sequence_S == number).nonzero()[0]) for number in range(len(lines))]
    assert (found.input_ids_ST[firsts, 0] == tokenizer.bos_token_id).all()


def test_passages_score_all_but_their_first_token() -> None:
    found = windows.of_passages(TokenSet(torch.arange(24).view(3, 8), adds_bos=True))
    assert found.scored_ST.sum(1).tolist() == [7, 7, 7] and not found.scored_ST[:, 0].any()


def test_answers_are_scored_behind_their_prompts() -> None:
    found = windows.of_exchanges([Exchange([1, 2, 3], [4, 5]), Exchange([6], [7])])
    assert found.input_ids_ST.tolist() == [[6, 7, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert found.input_ids_ST[found.scored_ST].tolist() == [7, 4, 5]
    assert found.lengths_S.tolist() == [2, 5]
