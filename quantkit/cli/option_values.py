"""What is written behind an option of the command line, as values: sizes, lists, schemes by pattern."""

import click


def size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """`16GiB` as bytes."""
    from quantkit.quantize.estimate import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def cluster(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """`ray://HOST:PORT`, `HOST:PORT` or `auto`, as Ray itself takes it."""
    from quantkit.recipe import cluster_address

    try:
        return None if text is None else cluster_address(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def count_or_all(context: click.Context, parameter: click.Parameter, text: str) -> int | str:
    """A number from 1, or `all`."""
    if text == "all" or (text.isdigit() and int(text) > 0):
        return text if text == "all" else int(text)
    raise click.BadParameter(f"{text!r}: give a number from 1, or all")


def overrides(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[dict[str, str | int]]:
    """`PATTERN:KEY=VALUE,...`, each as a mapping with the pattern as `match`."""
    found: list[dict[str, str | int]] = []
    for text in texts:
        pattern, colon, pairs = text.rpartition(":")
        given = [pair.partition("=") for pair in pairs.split(",")]
        if not colon or not pattern or any(not key or not value for key, _, value in given):
            raise click.BadParameter(f"{text!r}: write it as '*.down_proj:bits=8,group_size=32,symmetric=true'")
        numbers = {key: int(value) for key, _, value in given if value.removeprefix("-").isdigit()}
        found.append({"match": pattern} | {key: value for key, _, value in given} | numbers)
    return found


def engine_options(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> dict[str, bool | int | float | str]:
    """`KEY=VALUE`, the value as in YAML."""
    import yaml

    found = {}
    for text in texts:
        key, equals, written = text.partition("=")
        value = yaml.safe_load(written) if key and equals else None
        if not isinstance(value, bool | int | float | str):
            raise click.BadParameter(f"{text!r}: write it as KEY=VALUE, a number, a word or true, for example iters=20")
        found[key] = value
    return found


def temperatures(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> list[float | str]:  # fmt: skip
    """Numbers, or `deployment`."""
    try:
        return [text if text == "deployment" else float(text) for text in texts]
    except ValueError:
        raise click.BadParameter(f"{', '.join(texts)}: give a number such as 0.7, or deployment") from None


def acceptance(context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """`acceptance=0.7` as 0.7."""
    if text is None:
        return None
    try:
        return float(text.removeprefix("acceptance="))
    except ValueError:
        raise click.BadParameter(f"{text!r}: write it as acceptance=0.7") from None


def numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """`4,16` as a list."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise click.BadParameter(f"{text!r}: write it as 4,16")
    return [int(word) for word in words]
