"""The prompts of each load: real ones, each asked once, alone or behind a beginning that all of them share."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from quantkit import artifacts, text
from quantkit.errors import QuantkitError
from quantkit.serve import rendering
from quantkit.serve.asking import PROMPTS

Kind = Literal["unique", "shared"]
OF_BUNDLE = "bundle"  # as a source of prompts: those that the bundle carries


class Load(NamedTuple):
    """So many requests at once, of one kind and temperature, in a round."""

    kind: Kind
    temperature: float
    concurrency: int
    round: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.kind}-t{self.temperature:g}-c{self.concurrency}-r{self.round}"


def prompts(source: str, bundle: Path) -> list[str]:
    """What users would ask, from a text source or the bundle's own load.

    Raises:
        QuantkitError: the source is none, or holds no prompt.
    """
    found = [
        document if isinstance(document, str) else str(document[-1]["content"])
        for document in text.documents(str(bundle / PROMPTS) if source == OF_BUNDLE else source)
    ]
    if not found:
        raise QuantkitError(f"prompts {source!r} holds none: give a JSONL file of prompts")
    return found


def system_prompt(file: Path | None) -> str:
    """The beginning that the shared workload's requests have in common."""
    return (file or rendering.templates() / "load" / "system_prompt.txt").read_text(encoding="utf-8").strip()


def endless(found: Sequence[str]) -> Iterator[str]:
    """The prompts in order and, where they run out, again with a number: no request's answer is in the cache yet."""
    yield from found
    for again in itertools.count(2):
        yield from (f"({again}) {prompt}" for prompt in found)


def write(path: Path, asked: Sequence[str], *, beginning: str | None, output_tokens: int) -> None:
    """A load's prompts in the form that vLLM's client reads."""
    rows = [
        {"prompt": f"{beginning}\n\n{prompt}" if beginning else prompt, "output_tokens": output_tokens}
        for prompt in asked
    ]
    artifacts.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
