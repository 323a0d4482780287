"""The evaluation as pages that people read: one HTML page that needs nothing beside it, and Markdown to paste.

Both are made from the numbers of report.json alone, so that an old report can be drawn again.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from quantkit.evaluate import plots
from quantkit.evaluate.plots import Point
from quantkit.pages import frame
from quantkit.pages.figures import Series
from quantkit.pages.spelling import UNKNOWN, between, count, error, known, number, size, spelled

_SIGNS = {"passed": "✓", "failed": "✕", "undecided": "?"}
_MEANINGS = {
    "Perplexity": "the exponential of the mean nll of a token: among how many tokens, so to say, the model wavers.",
    "Drift": "how far the candidate's perplexity is above the reference's, as a share of it. 0 is no loss.",
    "KL": "how far the candidate's distribution over the next token is from the reference's, in nats a token. "
    "0 is the same distribution. It sees changes that drift averages away.",
    "Agreement": "how often both have the same most likely token (top-1), and which share of the reference's five "
    "likeliest tokens are among the candidate's five (top-5).",
    "Interval": "where the value lies with 95 % certainty, given how much it differs between sequences.",
    "Recovery": "a task's score as a share of the reference's.",
    "Accepted length": "tokens that one pass of the model yields with its draft: 1 and what was accepted of the draft.",
    "Apart from the weights": "the nll that vLLM computes with its kernels less the one computed in float32 from the "
    "same weights.",
}  # fmt: skip


_CAPTIONS = {
    "pareto": "Further down and further left is better; what lies above the stepped line is beaten in both by another.",
    "drift": "An even rise means that all text suffers alike; a steep end, that some text suffers most.",
    "kl": "A line that rises to the right tells of errors that grow with the context.",
    "context": "At the right are the tokens with the longest context: a line that rises says that it suffers most.",
    "histogram": "The longer the tail to the right, the more tokens that the candidate would choose otherwise.",
    "layers": "A step up marks a layer whose quantization costs most; all layers behind it carry what it adds.",
    "linears": "A column that stands out is a layer, a row that does a kind of linear, that wants more bits.",
    "cache": "What the cache adds to the weights' error: a line that rises tells of one that grows with the context.",
    "alone": "A layer that stands out is one to leave at 16 bits, where the cache's cost matters beside the weights'.",
    "acceptance": "A token counts where all before it were accepted; 1 and the bars add up to the accepted length.",
}


class Cell(NamedTuple):
    """A value, and the smaller print under it."""

    text: str
    detail: str = ""


class Row(NamedTuple):
    """A metric of all candidates."""

    metric: str
    reference: Cell
    cells: list[Cell]


class Section(NamedTuple):
    """Rows that were measured on the same."""

    title: str
    rows: list[Row]


class Figure(NamedTuple):
    """A picture, and the sentence that says what to read from it."""

    title: str
    caption: str
    svg: str
    places: list[int]  # of the candidates that it shows


class Track(NamedTuple):
    """Where a gate's value, interval and limit stand on a scale, in percent of its width."""

    value: float
    low: float
    high: float
    limit: float
    kept: tuple[float, float]


def html(results: Mapping[str, Any]) -> str:
    """The report as one HTML page without scripts and without anything fetched, for light and dark, wide and narrow."""
    from markupsafe import Markup

    figures = [figure._replace(svg=Markup(figure.svg)) for figure in _figures(results)]  # made by plots, escaped there
    return frame.render(
        "quantkit.evaluate", "report.html.j2",
        r=results, title=_title(results), names=_names(results), summary=_summary(results), gates=_gates(results),
        sections=_sections(results), figures=figures, meanings=_MEANINGS, signs=_SIGNS, models=_models(results),
        sets=_sets(results), made=_made(results), command=results["made"].get("command"),
    )  # fmt: skip


def markdown(results: Mapping[str, Any]) -> str:
    """The same facts as Markdown, as GitHub reads it."""
    names = _names(results)
    parts = [f"## {_plain(_title(results))}: {results['verdict']}", _plain(_summary(results))]
    if results.get("note"):
        parts.append("> " + _plain(results["note"]))
    if results["gates"]:
        rows = [
            [g["verdict"], g["candidate"], g["name"], g["said"], g["between"] or UNKNOWN, g["bound"]]
            for g in _gates(results)
        ]
        parts.append(_table(["verdict", "candidate", "gate", "value", "95 % interval", "limit"], rows))
        said = [f"- {_plain(gate['sentence'])}" for gate in results["gates"] if gate["verdict"] != "passed"]
        parts += ["\n".join(said)] if said else []
    if sections := _sections(results):
        rows = []
        for section in sections:
            rows.append([f"**{_plain(section.title)}**"] + [""] * (1 + len(names)))
            rows += [
                [_plain(row.metric), *(_plain(_joined(c)) for c in (row.reference, *row.cells))] for row in section.rows
            ]
        parts.append(_table(["", "reference", *names], rows, ready=True))
    for heading, columns, rows in (
        ("What was run", ["model", "size", "bits per weight", "digest", "path"], [[*row] for row in _models(results)]),
        ("On what", ["set", "sources", "sequences", "scored tokens", "window", "stride", "BOS"], _sets(results)),
        ("With what", ["", ""], [[*row] for row in _made(results)]),
    ):
        if rows:
            parts += [f"### {heading}", _table(columns, rows)]
    if command := results["made"].get("command"):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
        parts += ["### How to run it again", f"{fence}sh\n{command}\n{fence}"]
    return "\n\n".join(parts) + "\n"


def _title(results: Mapping[str, Any]) -> str:
    names = _names(results)
    who = " and ".join(names) if 0 < len(names) < 3 else f"{len(names)} candidates"
    return f"{who} against {results['reference']['name']}"


def _names(results: Mapping[str, Any]) -> list[str]:
    """What each candidate is called: the same model may come twice, with another KV cache."""
    return [
        each["name"] + ("" if each.get("kv_cache", "auto") == "auto" else f", {each['kv_cache']} KV cache")
        for each in results["candidates"]
    ]


def _summary(results: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    gates = results["gates"]
    count = {word: sum(gate["verdict"] == word for gate in gates) for word in _SIGNS}
    profile = f"the profile {results['profile']}"
    if not gates:
        return f"No limit of {profile} was judged."
    if count["passed"] == len(gates):
        return (
            f"All {len(gates)} limits of {profile} are kept." if len(gates) > 1 else f"The limit of {profile} is kept."
        )
    said = [f"{count['failed']} failed"] if count["failed"] else []
    said += [f"{count['undecided']} undecided"] if count["undecided"] else []
    return f"{count['passed']} of {len(gates)} limits of {profile} are kept; {' and '.join(said)}."


def _gates(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gates, worst first, with their numbers spelled out."""
    order = ["failed", "undecided", "passed"]
    return [
        {
            **gate, "said": spelled(gate["value"], gate["unit"]), "between": between(gate["interval"], gate["unit"]),
            "bound": f"{gate['direction']} {spelled(gate['limit'], gate['unit'])}", "track": _track(gate),
        }
        for gate in sorted(results["gates"], key=lambda gate: order.index(gate["verdict"]))
    ]  # fmt: skip


def _track(gate: Mapping[str, Any]) -> Track | None:
    """The gate's scale: it holds the limit and the whole interval, with some air around."""
    value, limit = gate["value"], gate["limit"]
    if not known(value):
        return None
    low, high = gate["interval"] or (value, value)
    begin, end = min(low, value, limit), max(high, value, limit)
    if gate["direction"] == "at most":
        begin = min(begin, 0.0)
    air = 0.15 * ((end - begin) or abs(end) or 1.0)
    begin, end = begin - (air if begin else 0), end + air

    def place(at: float) -> float:
        return round(float(100 * (at - begin) / (end - begin)), 2)

    kept = (0.0, place(limit)) if gate["direction"] == "at most" else (place(limit), 100.0)
    return Track(place(value), place(low), place(high), place(limit), kept)


def _sections(results: Mapping[str, Any]) -> list[Section]:
    """The table of metrics; rows that nobody has a value for are left out."""
    candidates, reference = results["candidates"], results["reference"]
    sections = [
        Section("Size", [
            _row("weights", size(reference.get("bytes")), [size(each.get("bytes")) for each in candidates]),
            _row("bits per weight", spelled(reference.get("bits_per_weight"), "tokens"),
                 [spelled(each.get("bits_per_weight"), "tokens") for each in candidates]),
        ])
    ]  # fmt: skip
    for kind in _kinds(results):
        found = [each.get("on", {}).get(kind) or {} for each in candidates]
        sections.append(Section(f"On {_said(kind)}", [
            *_perplexities(found),
            _estimates("KL in nats, mean", found, "kl_nats", "nats"),
            *(_row(f"KL in nats, {word}", "", [
                  _estimate({"value": _kl(each).get(key)}, "nats")
                  for each in found
              ])
              for word, key in (("median", "median"), ("99th percentile", "p99"))),
            _estimates("top-1 agreement", found, "top1_agreement", "percent"),
            _estimates("top-5 agreement", found, "top5_agreement", "percent"),
        ]))  # fmt: skip
    for kind in _kinds(results):
        found = [(each.get("served") or {}).get(kind) or {} for each in candidates]
        sections.append(Section(f"Served by vLLM, on {_said(kind)}", [
            *_perplexities(found), _estimates("apart from the weights, nats", found, "gap_nats", "nats"),
            _estimates("top-1 agreement", found, "top1_agreement", "percent"),
        ]))  # fmt: skip
    caches = [each.get("cache") or {} for each in candidates]
    sections.append(Section("The KV cache, beside the same weights with one of 16 bits", [
        _row("type", "", [each.get("type", UNKNOWN) for each in caches]),
        _row("scales", "", [each.get("scales", UNKNOWN) for each in caches]),
        *(row for kind in _kinds(results) for row in _cache_rows(kind, caches)),
        _row("layers to leave at 16 bits", "", [_listed(each.get("leave_at_16_bits")) for each in caches]),
        _estimates("KL with those left, on text, nats", caches, "with_those_left", "nats"),
    ]))  # fmt: skip
    sections.append(Section("Tasks", [row for task in _tasks(candidates) for row in _task_rows(task, candidates)]))
    drafts = [each.get("acceptance") or {} for each in candidates]
    longest = max((len(each.get("per_position") or []) for each in drafts), default=0)
    sections.append(Section("Acceptance of the draft", [
        _row("accepted length, tokens", "", [
            Cell(spelled(each.get("accepted_length"), "tokens"), error(each.get("accepted_length_error"), "tokens"))
            for each in drafts
        ]),
        *(_row(f"accepted at position {place + 1}", "", [spelled(_at(each, place), "percent") for each in drafts])
          for place in range(longest)),
        _row("drafts", "", [count(each.get("drafts")) for each in drafts]),
    ]))  # fmt: skip
    kept = [Section(title, [row for row in rows if _says(row)]) for title, rows in sections]
    return [section for section in kept if section.rows]


def _cache_rows(kind: str, caches: Sequence[Mapping[str, Any]]) -> list[Row]:
    found = [_on(each, kind) for each in caches]
    return [
        _estimates(f"KL on {_said(kind)}, nats", found, "kl_nats", "nats"),
        _estimates(f"drift on {_said(kind)}", found, "drift", "percent", sign="+"),
    ]


def _listed(numbers: Sequence[int] | None) -> str:
    return UNKNOWN if numbers is None else ", ".join(map(str, numbers)) or "none"


def _row(metric: str, reference: Cell | str, cells: Sequence[Cell | str]) -> Row:
    first, *others = (each if isinstance(each, Cell) else Cell(each) for each in (reference, *cells))
    return Row(metric, first, others)


def _says(row: Row) -> bool:
    return any(cell.text not in ("", UNKNOWN) for cell in (row.reference, *row.cells))


def _perplexities(found: Sequence[Mapping[str, Any]]) -> list[Row]:
    both = [each.get("perplexity") or {} for each in found]
    # vLLM's report may have the candidate's alone
    pairs = [each if isinstance(each, Mapping) else {"candidate": each} for each in both]
    reference = next((each["reference"] for each in pairs if known(each.get("reference"))), None)
    return [
        _row("perplexity", number(reference, ".3f") if reference is not None else "",
             [number(each.get("candidate"), ".3f") for each in pairs]),
        _estimates("perplexity drift", found, "drift", "percent", sign="+"),
    ]  # fmt: skip


def _estimates(metric: str, found: Sequence[Mapping[str, Any]], key: str, unit: str, sign: str = "") -> Row:
    return _row(metric, "", [_estimate(each.get(key), unit, sign) for each in found])


def _estimate(found: Mapping[str, Any] | None, unit: str, sign: str = "") -> Cell:
    if not found:
        return Cell(UNKNOWN)
    said = spelled(_value(found), unit, sign).removesuffix(" nats")  # the row's name has the unit
    return Cell(said, between(found.get("interval"), unit) or error(found.get("standard_error"), unit))


def _task_rows(task: tuple[str, str], candidates: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows: list[Mapping[str, Any]] = [
        next((row for row in each.get("tasks") or [] if (row["task"], row["metric"]) == task), {})
        for each in candidates
    ]
    first = next(row for row in rows if row)
    samples = [f"{count(row.get('samples'))} samples" if row else "" for row in rows]
    scores = [number(row.get("candidate"), ".4f") for row in rows]
    recovered = [{"value": row.get("recovery"), "standard_error": row.get("standard_error")} for row in rows]
    return [
        _row(f"{task[0]}, {task[1]}", number(first.get("reference"), ".4f"), list(map(Cell, scores, samples))),
        _row(f"{task[0]}, recovery", "", [_estimate(each, "percent") for each in recovered]),
    ]


def _tasks(candidates: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["task"], row["metric"]) for each in candidates for row in each.get("tasks") or []))


def _figures(results: Mapping[str, Any]) -> list[Figure]:
    """The pictures that there are numbers for."""
    candidates, names, kinds = results["candidates"], _names(results), _kinds(results)
    figures: list[Figure] = []

    def add(draw: Callable[..., str], name: str, title: str, found: Sequence[Any], **more: Any) -> None:
        series = [Series(place, each) for place, each in enumerate(found) if each]
        if series:
            places = [one.place for one in series]
            spoken = f"{title}: {', '.join(names[place] for place in places)}"
            caption = _CAPTIONS[name.split("-")[0]]
            figures.append(Figure(title, caption, draw(series, name=name, title=spoken, **more), places))

    on = {kind: [_on(each, kind) for each in candidates] for kind in kinds}
    for kind, found in on.items():  # picture by picture, so that prose and chat stand side by side
        points = [_point(*each) for each in zip(candidates, found, names, strict=True)]
        if len(points) > 1:
            add(plots.size_against_kl, f"pareto-{kind}", f"Size against KL, on {_said(kind)}", points)
    for kind, found in on.items():
        drifts = [each.get("drift_by_sequence") for each in found]
        add(plots.drift_by_sequence, f"drift-{kind}", f"Drift of each sequence, on {_said(kind)}", drifts)
    for kind, found in on.items():
        means = [_kl(each).get("by_position") for each in found]
        add(plots.by_position, f"kl-{kind}", f"KL by position, on {_said(kind)}", means, measure="KL")
    for kind, found in on.items():
        bins = [each.get("perplexity_by_position") or [] for each in found]
        drifts = [[(begin, theirs / ours - 1) for begin, ours, theirs in each] for each in bins]
        add(plots.by_position, f"context-{kind}", f"Drift by position, on {_said(kind)}", drifts, measure="drift")
    for kind, found in on.items():
        counted = [_counted(_kl(each).get("histogram")) for each in found]
        marks = [_marks(_kl(each)) for each, there in zip(found, counted, strict=True) if there]
        add(plots.kl_histogram, f"histogram-{kind}", f"Distribution of KL, on {_said(kind)}", counted,
            marks=marks[0] if len(marks) == 1 else [])  # fmt: skip
    add(plots.by_layer, "layers", "Error by layer", [each.get("by_layer") for each in candidates], measure="error")
    figures += _linears(candidates, names)
    caches = [each.get("cache") or {} for each in candidates]
    for kind in kinds:
        means = [_kl(_on(each, kind)).get("by_position") for each in caches]
        title = f"KL of the KV cache by position, on {_said(kind)}"
        add(plots.by_position, f"cache-{kind}", title, means, measure="KL")
    alone = [(each.get("by_layer") or {}).get("kl_nats") for each in caches]
    add(plots.by_layer, "alone", "KL of the KV cache of one layer alone", alone, measure="KL")
    rates = [(each.get("acceptance") or {}).get("per_position") for each in candidates]
    add(plots.acceptance_by_position, "acceptance", "Acceptance by position", rates)
    return figures


def _on(each: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return (each.get("on") or {}).get(kind) or {}


def _kl(found: Mapping[str, Any]) -> Mapping[str, Any]:
    return found.get("kl_nats") or {}


def _point(each: Mapping[str, Any], found: Mapping[str, Any], name: str) -> Point | None:
    bits, kl = each["bits_per_weight"], _value(_kl(found))
    if not (known(bits) and known(kl)):
        return None
    tip = f"{name}: {spelled(bits, 'tokens')} bits per weight, {size(each.get('bytes'))}, {spelled(kl, 'nats')}"
    return Point(float(bits), float(kl), _kl(found).get("interval"), tip)


def _counted(histogram: Mapping[str, Any] | None) -> tuple[Sequence[float], Sequence[float]] | None:
    if not histogram or sum(histogram["counts"]) <= 0:
        return None
    return histogram["edges"], histogram["counts"]


def _marks(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    marks = [("median", found.get("median")), ("mean", _value(found)), ("99 %", found.get("p99"))]
    return [(word, at) for word, at in marks if known(at) and at > 0]


def _linears(candidates: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Figure]:
    """A map of each model's linears, all on one scale; a model that came twice is drawn once."""
    drawn: dict[str, tuple[int, dict[tuple[str, int], float], list[str]]] = {}
    for place, each in enumerate(candidates):
        errors, others = {}, []
        for linear in each.get("linears") or []:
            found = re.search(r"\.(\d+)\.(?:.*\.)?([^.]+)$", linear["name"])
            if found:
                errors[found[2], int(found[1])] = linear["relative_error"]
            else:
                others.append(f"{linear['name']}: {spelled(linear['relative_error'], 'percent')}")
        if errors:
            drawn.setdefault(each.get("digest") or names[place], (place, errors, others))
    largest = max((each for _, errors, _ in drawn.values() for each in errors.values()), default=0.0)
    return [
        Figure(
            "Error of each linear",
            f"{_CAPTIONS['linears']} Full color is a relative error of {spelled(largest, 'percent')}."
            + (f" Outside the layers: {', '.join(others)}." if others else ""),
            plots.error_by_linear(
                errors, largest=largest, place=place, name=f"linears-{place}",
                title=f"Error of each linear: {names[place]}",
            ),
            [place],
        )
        for place, errors, others in drawn.values()
    ]  # fmt: skip


def _models(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Name, size, bits per weight, digest and path of the reference and of each candidate."""
    models = [(f"{results['reference']['name']} (reference)", results["reference"])]
    models += zip(_names(results), results["candidates"], strict=True)
    return [
        (name, size(each.get("bytes")), spelled(each.get("bits_per_weight"), "tokens"),
         each.get("digest") or UNKNOWN, each.get("path") or UNKNOWN)
        for name, each in models
    ]  # fmt: skip


def _sets(results: Mapping[str, Any]) -> list[list[str]]:
    counts = ("sequences", "scored_tokens", "window_tokens", "stride")
    return [
        [kind, ", ".join(each["sources"]), *(count(each[key]) for key in counts), "yes" if each["adds_bos"] else "no"]
        for kind, each in (results.get("sets") or {}).items()
    ]  # fmt: skip


def _made(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    made = results["made"]
    seconds = made.get("seconds")
    said = {
        "quantkit": made.get("quantkit"), "profile": results["profile"], "machine": made.get("machine"),
        "device": made.get("device"), "date": made.get("date"), "seed": made.get("seed"),
        "took": None if seconds is None else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min",
    }  # fmt: skip
    return [(word, str(value)) for word, value in said.items() if value is not None]


def _kinds(results: Mapping[str, Any]) -> list[str]:
    """The sets of text, in the report's order."""
    found = [kind for each in results["candidates"] for part in ("on", "served") for kind in each.get(part) or {}]
    return list(dict.fromkeys(found))


def _said(kind: str) -> str:
    return {"text": "prose"}.get(kind, kind)


def _value(found: Mapping[str, Any]) -> Any:
    return found.get("value")


def _at(draft: Mapping[str, Any], place: int) -> float | None:
    rates = draft.get("per_position") or []
    return rates[place] if place < len(rates) else None


def _joined(cell: Cell) -> str:
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, ready: bool = False) -> str:
    """A Markdown table; `ready` rows are Markdown already."""
    lines = [list(map(_plain, columns)), ["---"] * len(columns)]
    lines += [list(row) if ready else list(map(_plain, row)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown and HTML take as it is."""
    text = re.sub(r"([\\`*|\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return escape(text, quote=False)
