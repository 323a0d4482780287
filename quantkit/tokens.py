"""Documents -> token set: windows of equal length, chat templates applied, BOS as the tokenizer wants it."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit import chat_template, checkpoint, foreign
from quantkit.architecture import size_problems
from quantkit.errors import QuantkitError, raise_all, refusing
from quantkit.text import Document, documents

_TOKENIZER_BYTES = 128 << 20  # the largest file of a tokenizer that is read; those of 262,144 tokens take 35 MB
_MOST_ID = 1 << 24  # of a token; the tokenizer's library takes four bytes and more for each id up to the largest
_SPAN = 32  # tokens; two texts that share a run of this length share a source


class TokenSet(NamedTuple):
    """Windows of text, ready for a forward pass."""

    input_ids_ST: Tensor  # int64 [samples, length]
    adds_bos: bool  # whether each window starts with the BOS token
    of_chats: tuple[int, ...] = ()  # which samples are of a source whose documents are chats
    written: int = 0  # of the samples, so many at the end: what the model wrote besides what was given


def shared_spans(first: TokenSet, second: TokenSet) -> float:
    """The fraction of the second set's 32-token runs that also occur in the first: 0 for disjoint texts."""
    known = set(_spans(first.input_ids_ST, step=1))
    seen = [span in known for span in _spans(second.input_ids_ST, step=_SPAN)]
    return sum(seen) / max(len(seen), 1)


def _spans(input_ids_ST: Tensor, *, step: int) -> Iterator[tuple[int, ...]]:
    for row in input_ids_ST.tolist():
        for begin in range(1, len(row) - _SPAN + 1, step):  # from 1: a BOS is no text
            yield tuple(row[begin : begin + _SPAN])


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer, from its own files and nothing else; none of its code.

    Raises:
        QuantkitError: no tokenizer, or one whose files are damaged, lead elsewhere or name code.
    """
    from transformers import AutoTokenizer

    raise_all(_tokenizer_problems(path))
    with refusing(f"{path} has no usable tokenizer", "get its tokenizer.json and tokenizer_config.json again"):
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        tokenizer("a")  # what its parts cannot do with text is raised here
        return tokenizer


def _tokenizer_problems(path: Path) -> list[str]:
    found = checkpoint.code_problems(path)
    for name in checkpoint.COMPANIONS:
        try:
            foreign.regular(path / name, within=path)
            if (path / name).stat().st_size > _TOKENIZER_BYTES:
                found.append(f"{path / name} has more than {_TOKENIZER_BYTES >> 20} MiB: get the file again")
        except FileNotFoundError:
            continue
        except QuantkitError as error:
            found.append(str(error))
    if not found:
        found += _id_problems(path / "tokenizer.json")
    if (path / "config.json").exists() and not found:
        config = foreign.json_object(path / "config.json", remedy="get the file again", within=path)
        found += [f"{path / 'config.json'}: {problem}" for problem in size_problems(config)]
    return found


def _id_problems(path: Path) -> list[str]:
    """Token ids that would fill the memory; a file that holds none is judged by who loads it."""
    try:
        said = json.loads(foreign.read(path, most=_TOKENIZER_BYTES, within=path.parent))
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    model = said.get("model") if isinstance(said, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = said.get("added_tokens") if isinstance(said, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [each.get("id") for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    largest = max((each for each in ids if isinstance(each, (int, float))), default=0)
    return [f"{path} has a token of id {largest}: get the file again"] if largest > _MOST_ID else []


def tokenize(
    sources: Sequence[str], tokenizer: Any, *, samples: int, length: int, seed: int,
    written: Mapping[str, Sequence[Document]] | None = None,
) -> TokenSet:  # fmt: skip
    """`samples` windows of `length` tokens, the same number from each source, drawn without overlap by `seed`.

    Documents are joined by EOS and cut in windows; chats are rendered by the chat template. A window starts with BOS
    where the tokenizer adds one to a text of its own accord, and only there. `written` has the documents of the sources
    that a model wrote (`self:N`).

    Raises:
        QuantkitError: a source has too few tokens; a chat without a chat template.
    """
    body = length - _adds_bos(tokenizer)
    windows: list[list[int]] = []
    of_chats: list[int] = []
    problems = []
    for number, source in enumerate(sources):
        share = samples // len(sources) + (number < samples % len(sources))
        known = (written or {}).get(source)
        found = documents(source) if known is None else iter(known)
        first = next(found, None)
        found = iter(()) if first is None else itertools.chain([first], found)
        chosen, available = _windows(source, found, tokenizer, share=share, body=body, seed=seed + number)
        if chosen is None:
            problems.append(
                f"text source {source!r} has {available} tokens, {share} samples of {length} need {share * body}: "
                "lower samples or length, or give more text"
            )
        else:
            of_chats += [] if isinstance(first, str) else range(len(windows), len(windows) + len(chosen))
            windows += chosen
    raise_all(problems)
    return _as_set(windows, tokenizer, length)._replace(of_chats=tuple(of_chats))


def in_order(found: Iterable[Document], tokenizer: Any, *, most: int, length: int) -> TokenSet:
    """At most `most` windows of `length` tokens, as `tokenize` cuts them, from the first documents on; or none."""
    body = length - _adds_bos(tokenizer)
    stream = [token for document in found for token in _ended(document, tokenizer)]
    count = min(len(stream) // body, most)
    return _as_set([stream[index * body : (index + 1) * body] for index in range(count)], tokenizer, length)


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _as_set(windows: list[list[int]], tokenizer: Any, length: int) -> TokenSet:
    """Windows without BOS as a set of windows of `length` that have it where the tokenizer adds it."""
    adds_bos = _adds_bos(tokenizer)
    if adds_bos:
        windows = [[tokenizer.bos_token_id, *window] for window in windows]
    return TokenSet(torch.tensor(windows, dtype=torch.int64).view(-1, length), adds_bos)


def _ended(document: Document, tokenizer: Any) -> list[int]:
    """A document as token ids, and the EOS behind it."""
    ids: list[int] = tokenizer(as_text(document, tokenizer), add_special_tokens=False)["input_ids"]
    return ids + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _windows(
    source: str, found: Iterator[Document], tokenizer: Any, *, share: int, body: int, seed: int
) -> tuple[list[list[int]] | None, int]:
    """The chosen windows and the tokens that were seen; None where there are too few."""
    stream: list[int] = []
    limit = share * body * 16  # of a hub data set with billions of tokens, read only a beginning
    for document in found:
        stream += _ended(document, tokenizer)
        if len(stream) > limit and source.startswith("hf:"):
            break
    count = len(stream) // body
    if count < share:
        return None, len(stream)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:share].sort().values
    return [stream[index * body : (index + 1) * body] for index in order.tolist()], len(stream)


def pack(texts: Sequence[Sequence[int]], *, length: int, samples: int) -> TokenSet:
    """Texts that are tokens already, joined and cut: at most `samples` windows of `length`, or of all there is."""
    stream = [token for text in texts for token in text]
    length = min(length, len(stream))
    count = min(len(stream) // length, samples)
    return TokenSet(torch.tensor(stream[: count * length]).view(count, length), adds_bos=False)


def whole(source: str, tokenizer: Any) -> TokenSet:
    """All of a source's tokens as one long sample, to look for shared text in."""
    stream: list[int] = []
    for document in documents(source):
        stream += tokenizer(as_text(document, tokenizer), add_special_tokens=False)["input_ids"]
    return TokenSet(torch.tensor([stream], dtype=torch.int64), adds_bos=False)


def as_text(document: Document, tokenizer: Any) -> str:
    """A document as text: a chat goes through the checkpoint's chat template."""
    if isinstance(document, str):
        return document
    if not getattr(tokenizer, "chat_template", None):
        raise QuantkitError("the text is chats and the checkpoint has no chat template: give plain text instead")
    return chat_template.render(tokenizer, document)
