"""What is read and which of its tokens are scored: passages, whole documents by strided windows, a model's answers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit import tokens
from quantkit.conversations import Exchange
from quantkit.errors import QuantkitError
from quantkit.text import documents
from quantkit.tokens import TokenSet


class Windows(NamedTuple):
    """Token windows for a forward pass, and the tokens that each of them scores."""

    input_ids_ST: Tensor  # int64; padded on the right with 0
    scored_ST: Tensor  # bool; never a window's first token, which nothing predicts
    sequence_S: Tensor  # int64: the passage, document or answer that a window is of
    adds_bos: bool  # whether sequences begin with BOS (of whole documents: with BOS or EOS, which is not scored)
    stride: int  # scored tokens from one window of a sequence to the next

    @property
    def lengths_S(self) -> Tensor:
        """Tokens of each window up to the last that counts: what stands behind it changes nothing."""
        places_T = torch.arange(1, self.scored_ST.shape[1] + 1)
        return (self.scored_ST * places_T).amax(1)


def of_passages(passages: TokenSet) -> Windows:
    """Passages of one length, each a sequence read by a single window: all but its first token are scored."""
    ids_ST = passages.input_ids_ST
    scored_ST = torch.ones(ids_ST.shape, dtype=torch.bool)
    scored_ST[:, 0] = False
    return Windows(ids_ST, scored_ST, torch.arange(len(ids_ST)), passages.adds_bos, ids_ST.shape[1])


def of_documents(sources: Sequence[str], tokenizer: Any, *, length: int, stride: int) -> Windows:
    """All documents of the sources, every token scored once, as lm-eval's rolling log-likelihood scores them.

    A document begins with BOS (without one, EOS), which is not scored.

    Raises:
        QuantkitError: the sources hold no text.
    """
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    windows: list[tuple[list[int], int]] = []
    sequence: list[int] = []
    for source in sources:
        for document in documents(source):
            ids = tokenizer(tokens.as_text(document, tokenizer), add_special_tokens=False)["input_ids"]
            found = list(rolling(ids, begin, length=length, stride=stride)) if ids else []
            sequence += [sequence[-1] + 1 if sequence else 0] * len(found)
            windows += found
    if not windows:
        raise QuantkitError(f"text {', '.join(sources)} holds no text to score: give another source")
    return _padded(windows, sequence, adds_bos=True, stride=stride)


def rolling(ids: Sequence[int], begin: int, *, length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows of `length` predicted tokens at most over a text, and how many of each, from its end, are scored.

    The first window holds `begin` and scores all its tokens; each other one moves on by `stride` tokens and scores
    those. So every token is predicted once, with `length` - `stride` tokens before it at least.
    """
    done = min(length, len(ids))
    yield [begin, *ids[:done]], done
    while done < len(ids):
        end = min(done + stride, len(ids))
        yield list(ids[end - length - 1 : end]), end - done
        done = end


def of_exchanges(exchanges: Sequence[Exchange]) -> Windows:
    """Answers, each a sequence, scored behind the prompts that they answer; the shortest first."""
    ordered = sorted(exchanges, key=lambda each: len(each.prompt) + len(each.answer))
    windows = [(each.prompt + each.answer, len(each.answer)) for each in ordered]
    return _padded(windows, list(range(len(windows))), adds_bos=False, stride=max(len(ids) for ids, _ in windows))


def _padded(windows: Sequence[tuple[list[int], int]], sequence: list[int], *, adds_bos: bool, stride: int) -> Windows:
    width = max(len(ids) for ids, _ in windows)
    ids_ST = torch.zeros(len(windows), width, dtype=torch.int64)
    scored_ST = torch.zeros(len(windows), width, dtype=torch.bool)
    for row, (ids, scored) in enumerate(windows):
        ids_ST[row, : len(ids)] = torch.tensor(ids)
        scored_ST[row, len(ids) - scored : len(ids)] = True
    return Windows(ids_ST, scored_ST, torch.tensor(sequence), adds_bos, stride)
