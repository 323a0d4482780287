"""What every room's tests need: small random checkpoints on disk, with a tokenizer and a chat template."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WriteLlama = Callable[..., Path]

CORPUS = (
    "The harbour of the town lies open to the west, and when the wind blows from there no ship can leave it. "
    "Say in one sentence what a library is for. Count from one to ten. Name three colours and a thing that has each."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "harbour",
    "town",
    "west",
    "wind",
    "ship",
    "library",
    "sentence",
    "colours",
    "thing",
    "count",
    "open",
    "leave",
    "blows",
    "name",
    "three",
    "ten",
    "one",
]


def write_tokenizer(directory: Path, *, vocab_size: int = 320) -> Tokenizer:
    """Write a byte-level BPE tokenizer with a chat template, and return it; the same text gives the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return tokenizer


def write_tiny_llama(
    directory: Path, *, layers: int = 2, seed: int = 0, vocab_size: int = 320, kv_heads: int = 2, heads: int = 2,
    dtype: torch.dtype = torch.float32, **config: Any,
) -> Path:  # fmt: skip
    """Write a random Llama checkpoint (hidden 64, heads of 64 / heads) with its tokenizer; returns the directory.

    The weights are drawn wide: with the usual initialisation all logits of a random model are nearly equal, and greedy
    decoding turns on the last bit. The output rows of special tokens and of bytes beyond ASCII are zero, so that greedy
    answers are plain text and never end early.
    """
    tokenizer = write_tokenizer(directory, vocab_size=vocab_size)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            **(settings | config),
        )
    )  # fmt: skip
    plain = [i for i in range(tokenizer.get_vocab_size()) if tokenizer.decode([i]).isascii() and tokenizer.decode([i])]
    silent = torch.ones(vocab_size, dtype=torch.bool)
    silent[plain] = False
    with torch.no_grad():
        model.lm_head.weight[silent] = 0
    model.to(dtype).save_pretrained(directory)
    return directory


def write_text(path: Path, *, words: int, seed: int) -> Path:
    """Write random English words, other ones for another seed."""
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(" ".join(WORDS[pick] for pick in picks) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_llama() -> WriteLlama:
    """The writer of tiny checkpoints, for tests that need another than `tiny_llama`."""
    return write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that is only read."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A calibration text and a held-out text."""
    folder = tmp_path_factory.mktemp("texts")
    return write_text(folder / "calibration.txt", words=3000, seed=1), write_text(
        folder / "held_out.txt", words=3000, seed=2
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick tests first, those that start vLLM after them, the quickstart last: what fails, fails early.

    Slow ones, which fetch an engine's packages, run where they are asked for: `-m slow`.
    """
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="fetches gigabytes: ask for it by -m slow"))
    items.sort(key=lambda item: 2 * ("quickstart" in item.keywords) + ("vllm" in item.keywords))
