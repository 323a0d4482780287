"""The pictures of a bench: what a request takes against how many are served at once, and what each technique gave."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.pages.figures import DASHES, HEIGHT, MUTED, TIP, Series, color, line, marker, picture


def against_concurrency(
    series: Sequence[Series], *, said: str, limit: float | None, name: str, title: str, rising: bool = False
) -> str:
    """A line a variant; `values` are rows (requests at once, median, interval or None). limit: drawn across."""
    with picture(name, title) as (axis, svg):
        loads = sorted({row[0] for one in series for row in one.values})
        for one in series:
            places = [loads.index(row[0]) + 0.04 * (one.place - 2) for row in one.values]
            axis.plot(places, [row[1] for row in one.values], marker=marker(one), **line(one))
            for place, (_, _, interval) in zip(places, one.values, strict=True):
                if interval:
                    axis.plot([place, place], interval, color=color(one.place), linewidth=1)
        if limit is not None:
            axis.axhline(limit, color=MUTED, linewidth=0.9, linestyle="dotted")
        axis.set(title=said, xlabel="requests at once")
        if rising:
            axis.set_ylim(0, None)
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter(lambda value, _: "")
        axis.set_xticks(range(len(loads)), [str(load) for load in loads])
        axis.set_xlim(-0.3, len(loads) - 0.7)
    return svg[0]


def ratios(rows: Sequence[Mapping[str, Any]], *, name: str, title: str) -> str:
    """A mark a technique and load, with its interval; to the right of 1 it is faster with the technique."""
    with picture(name, title, height=max(HEIGHT, 0.9 + 0.24 * len(rows))) as (axis, svg):
        for place, row in enumerate(rows):
            shade = {"gain": color(2), "loss": color(1)}.get(row["verdict"], MUTED)
            if row["interval"]:
                axis.plot(row["interval"], [place, place], color=shade, linewidth=1.4)
            (drawn,) = axis.plot(row["value"], place, "o", color=shade, markersize=5)
            drawn.set_gid(f"{TIP}{row['said']}")
        axis.axvline(1, color=MUTED, linewidth=0.9, linestyle=DASHES[1])
        axis.set_xscale("log")
        axis.set(title="times as fast with it", ylim=(len(rows) - 0.4, -0.6))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
        axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axis.grid(visible=True, axis="x")
        axis.grid(visible=False, axis="y")
    return svg[0]
