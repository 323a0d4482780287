"""Windows of tokens: their number and length, BOS only where the tokenizer wants it, chats by their template."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from quantkit import tokens
from quantkit.errors import QuantkitError


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = tokens.load_tokenizer(tiny_llama)
    return loaded


def test_windows_are_disjoint_text_and_follow_the_seed(
    tokenizer: PreTrainedTokenizerFast, texts: tuple[Path, Path]
) -> None:
    first, again, other = (
        tokens.tokenize([str(texts[0])], tokenizer, samples=6, length=64, seed=seed) for seed in (0, 0, 1)
    )
    assert first.input_ids_ST.shape == (6, 64) and not first.adds_bos
    assert first.input_ids_ST.equal(again.input_ids_ST) and not first.input_ids_ST.equal(other.input_ids_ST)
    assert tokenizer.decode(first.input_ids_ST[0]) in texts[0].read_text()


def test_bos_stands_at_the_start_of_each_window_where_the_tokenizer_adds_it(
    tokenizer: PreTrainedTokenizerFast, texts: tuple[Path, Path]
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found = tokens.tokenize([str(texts[0])], tokenizer, samples=3, length=32, seed=0)
    assert found.adds_bos and found.input_ids_ST[:, 0].tolist() == [0, 0, 0]
    assert (found.input_ids_ST[:, 1:] != 0).all()


def test_too_few_tokens_says_how_many_there_are(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("count from one to ten")
    with pytest.raises(QuantkitError, match=r"short.txt' has \d+ tokens, 4 samples of 64 need 256"):
        tokens.tokenize([str(path)], tokenizer, samples=4, length=64, seed=0)


def test_sources_share_the_samples(
    tokenizer: PreTrainedTokenizerFast, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One two ten."}]}
    chats.write_text((json.dumps(chat) + "\n") * 50)
    found = tokens.tokenize([str(texts[0]), str(chats)], tokenizer, samples=5, length=32, seed=0)
    rendered = [tokenizer.decode(row) for row in found.input_ids_ST]
    assert ["<|user|>" in window for window in rendered] == [False, False, False, True, True]


def test_shared_spans_tell_the_same_text_from_another(
    tokenizer: PreTrainedTokenizerFast, texts: tuple[Path, Path]
) -> None:
    windows = tokens.tokenize([str(texts[1])], tokenizer, samples=6, length=64, seed=0)
    assert tokens.shared_spans(tokens.whole(str(texts[1]), tokenizer), windows) == 1
    assert tokens.shared_spans(tokens.whole(str(texts[0]), tokenizer), windows) == 0
