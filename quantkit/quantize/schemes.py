"""Which linears are stored otherwise than the rest, or left in 16 bits: patterns worked out before anything runs."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from quantkit.architecture import INPUT_GROUPS, Architecture, layer_prefix, linear_shapes
from quantkit.errors import QuantkitError, raise_all
from quantkit.formats import Storage, Storages
from quantkit.patterns import Patterns


class Override(NamedTuple):
    """A scheme for the linears that match; None: as everywhere else."""

    match: str
    bits: int | None = None
    group_size: int | None = None  # -1: per channel
    symmetric: bool | None = None


def plan(
    arch: Architecture, usual: Storage, ignore: tuple[str, ...] = (), overrides: tuple[Override, ...] = ()
) -> Storages:
    """How every linear is stored.

    Patterns are shell globs on full names ("*.down_proj", "model.layers.0.*"), or regular expressions for the whole
    name behind "re:". Of several overrides that match the last one wins; what is ignored stays so.

    Raises:
        QuantkitError: a pattern that matches nothing, linears that vLLM runs as one and that would differ, and schemes
            that the format cannot say.
    """
    problems = []
    special: dict[str, Storage | None] = {}
    names = [layer_prefix(index) + linear for index in range(arch.num_layers) for linear in linear_shapes(arch)]

    patterns = Patterns()

    def matching(pattern: str) -> list[str]:
        try:
            return [name for name in names if _matches(pattern, name, patterns)]
        except ValueError as error:
            raise QuantkitError(f"{error}: write another, or a shell glob such as '*.down_proj'") from None

    for override in overrides:
        given = {k: v for k, v in override._asdict().items() if k != "match" and v is not None}
        matched = matching(override.match)
        if not matched:
            problems.append(_nothing("override", override.match, names))
        special |= {name: usual._replace(**given) for name in matched}
    for pattern in ignore:
        matched = matching(pattern)
        if not matched:
            problems.append(_nothing("ignore", pattern, names))
        special |= dict.fromkeys(matched)
    special = {name: storage for name, storage in special.items() if storage != usual}
    storages = Storages(usual, special)
    problems += _torn_apart(arch, storages)
    if usual.format == "awq" and any(special.values()):
        problems.append("awq stores all its linears alike: choose compressed-tensors (or gptq) for overrides")
    if len(special) == len(names) and not any(special.values()):
        problems.append("all linears are ignored: nothing is left to quantize")
    raise_all(problems)
    return storages


def _matches(pattern: str, name: str, patterns: Patterns) -> bool:
    if pattern.startswith("re:"):
        return patterns.match(pattern.removeprefix("re:"), name, whole=True)
    return fnmatchcase(name, pattern)


def _nothing(key: str, pattern: str, names: list[str]) -> str:
    return f"{key} {pattern!r} matches no linear: names are like {names[0]} and {names[-1]}, so write '*.down_proj'"


def _torn_apart(arch: Architecture, storages: Storages) -> Iterator[str]:
    for group in INPUT_GROUPS:
        for index in range(arch.num_layers):
            members = [layer_prefix(index) + linear for linear in group]
            if len({storages.of(name) for name in members}) > 1:
                last = [linear.rpartition(".")[2] for linear in group]
                yield (
                    f"{', '.join(last)} of layer {index} are one linear in vLLM and must share a scheme: match all of "
                    f"them, for example by 're:.*\\.({'|'.join(last)})'"
                )
                break
