"""Where text comes from: one grammar of sources, and what must not stand on both sides of a measurement.

hf:ORG/NAME[/CONFIG][:SPLIT]   a data set by its hub name (package `datasets`)
file.jsonl                     a line a document: {"text": ...}, {"prompt": ...} or {"messages": [...]}
file.txt, file.md              one document
folder/                        its .txt, .md and .jsonl files, sorted by name
package:NAME/PATH              a file or folder that an installed Python package ships
self:N                         N prompts that the model writes itself; to calibrate, with its answers
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from quantkit import foreign, provenance
from quantkit.errors import QuantkitError, one_line, raise_all

_SUFFIXES = (".txt", ".md", ".jsonl")
_LINE = 16 << 20  # characters of a line of JSON that are read

Message = dict[str, str]
Document = str | list[Message]


def self_prompts(source: str) -> int | None:
    """N of `self:N`, or None for any other source.

    Raises:
        QuantkitError: N is no positive whole number.
    """
    if not source.startswith("self:"):
        return None
    count = source.removeprefix("self:")
    if not count.isdigit() or int(count) == 0:
        raise QuantkitError(f"text source {source!r}: write self:N with N prompts, for example self:400")
    return int(count)


def resolve(source: str) -> list[Path]:
    """The files behind a local source, sorted; empty for `hf:` and `self:`.

    Raises:
        QuantkitError: the source is none of the grammar's, or there is nothing behind it.
    """
    if source.startswith(("hf:", "self:")):
        return []
    path = _package_path(source) if source.startswith("package:") else Path(source)
    if path.is_file() and path.suffix in _SUFFIXES:
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in _SUFFIXES)
        for file in files:
            foreign.regular(file, within=path)
        if files:
            return files
        raise QuantkitError(f"text source {source!r}: the folder holds no .txt, .md or .jsonl file")
    if path.is_file():
        raise QuantkitError(f"text source {source!r}: {path.suffix or 'no suffix'} is unknown; use .txt, .md or .jsonl")
    raise QuantkitError(
        f"text source {source!r} is not there: give a .txt, .md or .jsonl file, a folder, "
        "package:NAME/PATH or hf:ORG/NAME[/CONFIG][:SPLIT]"
    )


def describe(sources: Sequence[str]) -> dict[str, str]:
    """The digest of each source, for manifests: of its files' bytes, or of its name where it has no files here."""
    return {
        source: provenance.digest_of([provenance.file_digest(file) for file in files] or [source])
        for source, files in ((source, resolve(source)) for source in sources)
    }


def refuse_shared_text(calibration: Sequence[str], held_out: Sequence[str]) -> None:
    """Refuse a held-out text that is also calibrated on: by name, by file, or by the bytes of a file.

    Raises:
        QuantkitError: naming each text that stands on both sides.
    """
    problems = [
        f"{source!r} is both calibration and held-out text: the drift would be flattered; use another text for one"
        for source in sorted(set(calibration) & set(held_out))
    ]
    if not problems:
        used = {provenance.file_digest(file): file for source in calibration for file in resolve(source)}
        for file in (file for source in held_out for file in resolve(source)):
            if (twin := used.get(provenance.file_digest(file))) is not None:
                problems.append(f"held-out text {file} is calibration text too ({twin}): use disjoint texts")
    raise_all(problems)


def documents(source: str) -> Iterator[Document]:
    """The documents of a source, in a fixed order."""
    if self_prompts(source) is not None:
        raise QuantkitError(
            f"text source {source!r}: what a model writes itself is for calibration and for drafts, not to judge it by"
        )
    if source.startswith("hf:"):
        yield from _hub_documents(source)
    for file in resolve(source):
        if file.suffix == ".jsonl":
            yield from _jsonl_documents(file)
        else:
            yield file.read_text(encoding="utf-8", errors="replace")


def _jsonl_documents(file: Path) -> Iterator[Document]:
    with file.open(encoding="utf-8", errors="replace") as stream:
        lines = iter(lambda: stream.readline(_LINE + 1), "")
        for number, line in enumerate(lines, start=1):
            if len(line) > _LINE:
                raise QuantkitError(
                    f"{file}, line {number}: it has over {_LINE >> 20}M characters: give shorter documents"
                )
            if not line.strip():
                continue
            try:
                yield _document(json.loads(line))
            except (ValueError, RecursionError) as error:
                why = one_line(error)[:200]
                raise QuantkitError(f"{file}, line {number}: {why}; a line is one JSON object") from error


def _document(row: Any) -> Document:
    if isinstance(row, dict):
        for key in ("text", "prompt", "content"):
            if isinstance(row.get(key), str):
                return _whole(row[key])
        messages = row.get("messages")
        if isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            return [{"role": _whole(m["role"]), "content": _whole(m["content"])} for m in messages]
    raise ValueError('no "text", "prompt" or "messages" in it')


def _whole(said: str) -> str:
    said.encode()  # half a surrogate pair, which JSON can spell and no tokenizer reads, is a ValueError
    return said


def _hub_documents(source: str) -> Iterator[Document]:
    from datasets import load_dataset

    name, _, split = source.removeprefix("hf:").partition(":")
    parts = name.split("/")
    config = parts[2] if len(parts) > 2 else None
    try:
        rows = load_dataset("/".join(parts[:2]), config, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise QuantkitError(f"text source {source!r} cannot be loaded ({line}): check name and network") from error
    for row in rows:
        try:
            yield _document(row)
        except ValueError as error:
            raise QuantkitError(f"text source {source!r}: {error}; its columns are {', '.join(row)}") from error


@cache
def _package_path(source: str) -> Path:
    package, _, name = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise QuantkitError(f"text source {source!r}: the package {package!r} is not installed; pip install it first")
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder) or not path.exists():
        shipped = sorted(
            {file.parent.relative_to(folder).as_posix() for s in _SUFFIXES for file in folder.rglob("*" + s)}
        )
        raise QuantkitError(
            f"text source {source!r} is not there; {package} has text in: {', '.join(shipped) or 'none'}"
        )
    return path
