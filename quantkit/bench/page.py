"""The bench as pages that people read: one HTML page that needs nothing beside it, and Markdown to paste.

Both are made from the numbers of bench.json alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quantkit.bench import plots
from quantkit.bench.gains import IN_WORDS
from quantkit.pages import frame
from quantkit.pages.figures import Series
from quantkit.pages.spelling import UNKNOWN, duration, known, number, times

KINDS = {"unique": "prompts of their own", "shared": "prompts that share a beginning"}
_SIGNS = {"gain": "✓", "loss": "✕", "no difference shown": "?"}
_STATES = {"gain": "passed", "loss": "failed", "no difference shown": "undecided"}  # the frame's colors
MEANINGS = {
    "TTFT": "time to the first token: from sending a request until its first token is there.",
    "TPOT": "time a token after the first: the rest of the request's time over the rest of its tokens.",
    "ITL": "the gap between two pieces of a stream. With speculation a piece holds several tokens: compare TPOT.",
    "Interval": "where the median lies with 95 % certainty, by order statistics over requests; a ratio's over pairs: "
    "the same prompt in the same round, with and without. Of tokens a second: the smallest and the largest round.",
    "Within the limits": "the share of requests that kept both limits, on the first token and on each further one.",
    "At once": "how many requests the client keeps under way.",
}  # fmt: skip


class Figure(NamedTuple):
    """A picture, the sentence that says what to read from it, and the variants it shows."""

    title: str
    caption: str
    svg: str
    places: list[int]


class Told(NamedTuple):
    """What one technique gave at one load: in a sentence, why, and how it is judged."""

    verdict: str
    state: str
    sign: str
    sentence: str
    why: str
    ratio: str
    interval: str


class Table(NamedTuple):
    """Rows under a heading; the first cell of a row names it."""

    title: str
    head: list[str]
    rows: list[list[str]]


def html(found: Mapping[str, Any]) -> str:
    """One HTML page without scripts and without anything fetched, for light and dark, wide and narrow."""
    from markupsafe import Markup

    figures = [figure._replace(svg=Markup(figure.svg)) for figure in _figures(found)]  # made by plots, escaped there
    return frame.render(
        "quantkit.bench", "bench.html.j2", title=_title(found), summary=summary(found), told=_told(found),
        names=_names(found), tables=_tables(found), figures=figures, meanings=MEANINGS, made=_made(found),
        variants=found["variants"], left_out=found["left_out"], clients=found["made"]["clients"],
        command=found["made"]["command"], date=found["made"].get("date"), beginning=found["workload"]["beginning"],
    )  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """The same facts as Markdown, as GitHub reads it."""
    parts = [f"## {_title(found)}", *(f"- {line}" for line in summary(found))]
    rows = [[one.verdict, one.sentence, one.ratio, one.interval, one.why] for one in _told(found)]
    parts = [parts[0], "\n".join(parts[1:])]
    parts += ["### What each technique gave", _table(["verdict", "", "times as fast", "interval", "why"], rows)]
    for table in _tables(found):
        parts += [f"### {table.title}", _table(table.head, table.rows)]
    served = [
        [one["name"], one["words"], _started(one), "; ".join(one["substitutes"]) or UNKNOWN]
        for one in found["variants"]
    ]
    served += [[name, "", f"left out: {why}", UNKNOWN] for name, why in found["left_out"].items()]
    parts += ["### What was served", _table(["variant", "", "answered after", "on this processor"], served)]
    parts += ["### With what", _table(["", ""], [list(row) for row in _made(found)])]
    commands = [found["made"]["command"] or "", *found["made"]["clients"].values()]
    parts += ["### How to run it again", "```sh\n" + "\n".join(line for line in commands if line) + "\n```"]
    return "\n\n".join(parts) + "\n"


def summary(found: Mapping[str, Any]) -> list[str]:
    """What a reader wants to know first, a sentence each."""
    lines = []
    by_technique: dict[str, list[Mapping[str, Any]]] = {}
    for gain in found["gains"]:
        by_technique.setdefault(gain["technique"], []).append(gain)
    for technique, gains in by_technique.items():
        best = max(gains, key=lambda gain: gain["ratios"][gain["judged_by"]]["value"])
        worst = min(gains, key=lambda gain: gain["ratios"][gain["judged_by"]]["value"])
        ends = [best] if best is worst else [best, worst]
        said = [f"{_ratio(one)} as fast {_where(one)}{_doubt(one)}" for one in ends]
        lines.append(f"{technique}, by {IN_WORDS[best['judged_by']]}: {', '.join(said)}")
    lines += [f"{name}: speculation turns negative {words}" for name, words in found["turns_negative"].items()]
    for name, knee in found["knees"].items():
        where = f"more than {knee['knee']:.0f} at once add little" if knee["knee"] else "no knee was found"
        lines.append(f"{name}: {where}, says guidellm ({knee['reason']})")
    for one in found["at_the_limits"]:
        if one["concurrency"]:
            price = one["price_per_million_tokens"]
            cost = f", {price:,.2f} a million tokens" if known(price) else ""
            lines.append(f"{one['variant']}: within the limits up to {one['concurrency']} at once{cost}")
    if not any(one["concurrency"] for one in found["at_the_limits"]):
        limits = found["limits"]
        lines.append(
            f"no variant kept the limits (first token {duration(limits['ttft_s'])}, each further one "
            f"{duration(limits['tpot_s'])}) for {limits['share']:.0%} of its requests at any load"
        )
    return lines


def _title(found: Mapping[str, Any]) -> str:
    return f"Before and after: {found['bundle']['model']}"


def _names(found: Mapping[str, Any]) -> list[str]:
    return [one["name"] for one in found["variants"]]


def _ratio(gain: Mapping[str, Any]) -> str:
    return times(gain["ratios"][gain["judged_by"]]["value"])


def _doubt(gain: Mapping[str, Any]) -> str:
    return " (no difference shown)" if gain["verdict"] == "no difference shown" else ""


def _where(gain: Mapping[str, Any]) -> str:
    return f"at {gain['concurrency']} at once" + (", shared beginning" if gain["kind"] == "shared" else "")


def _told(found: Mapping[str, Any]) -> list[Told]:
    told = []
    for gain in found["gains"]:
        ratio = gain["ratios"][gain["judged_by"]]
        between = f"{ratio['interval'][0]:.2f} to {ratio['interval'][1]:.2f}" if ratio["interval"] else UNKNOWN
        heat = f", temperature {gain['temperature']:g}" if gain["temperature"] else ""
        sentence = (
            f"{gain['technique']}: {gain['variant']} against {gain['without']}, {IN_WORDS[gain['judged_by']]}, "
            f"{_where(gain).removeprefix('at ')}{heat}"
        )
        told.append(
            Told(
                gain["verdict"], _STATES[gain["verdict"]], _SIGNS[gain["verdict"]], sentence, gain["why"],
                times(ratio["value"]), between,
            )
        )  # fmt: skip
    return told


def _tables(found: Mapping[str, Any]) -> list[Table]:
    tables = []
    loads = dict.fromkeys((row["kind"], row["temperature"], row["concurrency"]) for row in found["cells"])
    order = _names(found)
    for kind, temperature, concurrency in sorted(loads, key=lambda load: (load[0] != "unique", load[1:])):
        rows = [
            row
            for row in found["cells"]
            if (row["kind"], row["temperature"], row["concurrency"]) == (kind, temperature, concurrency)
        ]
        heat = f", temperature {temperature:g}" if temperature else ""
        tables.append(
            Table(
                f"{concurrency} at once, {KINDS[kind]}{heat}", list(_COLUMNS),
                [_row(row, found) for row in sorted(rows, key=lambda row: order.index(row["variant"]))],
            )
        )  # fmt: skip
    return tables


_COLUMNS = ("variant", "TTFT", "p95", "p99", "TPOT", "p95", "p99", "ITL p50, p99", "request", "p99", "tokens/s a user",
            "tokens/s in all", "within the limits", "KV used", "preempted", "accepted length", "prefix hits",
            "a million tokens")  # fmt: skip


def _row(row: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    def seconds(name: str, *which: str) -> list[str]:
        return [duration(row[name].get(each)) for each in which]

    accepted, hits = row["acceptance"], row["prefix_hit_rate"]
    return [
        row["variant"],
        _middle(row["ttft_s"]), *seconds("ttft_s", "p95", "p99"),
        _middle(row["tpot_s"]), *seconds("tpot_s", "p95", "p99"),
        ", ".join(seconds("itl_s", "p50", "p99")),
        *seconds("latency_s", "p50", "p99"),
        number(row["tokens_per_s_per_user"], ".1f"),
        number(row["tokens_per_s"]["median"], ".1f"),
        f"{row['within_limits']:.0%}",
        f"{row['kv_usage']:.1%}",
        f"{row['preemptions']:.0f}",
        f"{accepted['accepted_length']:.2f}" if accepted else UNKNOWN,
        f"{hits:.0%}" if known(hits) else UNKNOWN,
        number(row["price_per_million_tokens"], ",.2f"),
    ]  # fmt: skip


def _middle(value: Mapping[str, Any]) -> str:
    if not value:
        return UNKNOWN
    if not value["interval"]:
        return duration(value["p50"])
    return f"{duration(value['p50'])} ({' to '.join(duration(each) for each in value['interval'])})"


def _figures(found: Mapping[str, Any]) -> list[Figure]:
    names, figures = _names(found), []

    def add(draw: Any, title: str, caption: str, places: list[int], **more: Any) -> None:
        figures.append(Figure(title, caption, draw(title=title, **more), places))

    for kind, words in KINDS.items():
        own = [row for row in found["cells"] if row["kind"] == kind and row["temperature"] == 0]
        if not own:
            continue
        for measure, said, limit in (("ttft_s", "TTFT, seconds", "ttft_s"), ("tpot_s", "TPOT, seconds", "tpot_s")):
            series = _series(own, names, lambda row, measure=measure: (row[measure]["p50"], row[measure]["interval"]))
            add(
                plots.against_concurrency, f"{said.split(',')[0]}, {words}",
                "Lower is better; the dotted line is the limit.", [one.place for one in series], series=series,
                said=said, limit=found["limits"][limit], name=f"{measure[:4]}-{kind}",
            )  # fmt: skip
        series = _series(own, names, lambda row: (row["tokens_per_s"]["median"], _ends(row["tokens_per_s"]["rounds"])))
        add(
            plots.against_concurrency, f"Tokens a second in all, {words}",
            "Higher is better; a line that stays flat has no room for more requests.", [one.place for one in series],
            series=series, said="tokens a second", limit=None, name=f"tokens-{kind}", rising=True,
        )  # fmt: skip
    if found["gains"]:
        rows = [_mark(gain) for gain in found["gains"]]
        caption = "Right of the line it is faster with the technique; a mark whose interval crosses it shows nothing."
        add(plots.ratios, "What each technique gave", caption, [], rows=rows, name="gains")
    return figures


def _series(rows: Sequence[Mapping[str, Any]], names: Sequence[str], read: Any) -> list[Series]:
    found = []
    for place, name in enumerate(names):
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["concurrency"])
        if own:
            found.append(Series(place, [(row["concurrency"], *read(row)) for row in own]))
    return found


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if len(values) > 1 else None


def _mark(gain: Mapping[str, Any]) -> dict[str, Any]:
    ratio = gain["ratios"][gain["judged_by"]]
    label = f"{gain['technique']}, {gain['concurrency']}" + (" shared" if gain["kind"] == "shared" else "")
    said = f"{gain['variant']} against {gain['without']}: {ratio['value']:.2f}"
    return {"label": label, "said": said, "verdict": gain["verdict"], **ratio}


def _started(one: Mapping[str, Any]) -> str:
    return f"did not start: {one['failed']}" if one["failed"] else f"{one['ready_s']:.0f} s"


def _made(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    made, load, limits = found["made"], found["workload"], found["limits"]
    machine = made["machine"]
    price = found["price_per_hour"]
    return [
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made["versions"].items())),
        ("bundle", f"{found['bundle']['path']}, target {found['bundle']['digests']['target'][:16]}"),
        ("baseline", found["baseline"]),
        (
            "load",
            f"{load['rounds']} rounds, each load on every variant in turn; at least {load['requests']} requests a load "
            f"and answers of at most {load['output_tokens']} tokens, seed {made['seed']}",
        ),
        ("limits", f"first token {duration(limits['ttft_s'])}, each further one {duration(limits['tpot_s'])}"),
        ("price", f"{price:g} an hour, as given" if price else "none was given"),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
