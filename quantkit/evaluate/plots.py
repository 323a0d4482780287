"""The pictures of an evaluation."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from quantkit.pages.figures import (
    INK,
    MUTED,
    TIP,
    Series,
    bars,
    color,
    line,
    marker,
    percent,
    picture,
    whole_numbers,
)


class Point(NamedTuple):
    """A candidate on the plane of size and distance."""

    bits_per_weight: float
    kl_nats: float
    interval: Sequence[float] | None
    tip: str


def drift_by_sequence(series: Sequence[Series], *, name: str, title: str) -> str:
    """Each sequence's drift, from the smallest to the largest: bars for one candidate, lines for several."""
    with picture(name, title) as (axis, svg):
        for one in series:
            drifts = sorted(one.values)
            if len(series) == 1:
                bars(axis, range(1, len(drifts) + 1), drifts, one.place, lambda v: f"{v:+.2%}")
            else:
                axis.plot(range(1, len(drifts) + 1), drifts, marker=marker(one), **line(one))
        axis.axhline(0, color=MUTED, linewidth=0.8)
        axis.set(title="perplexity drift", xlabel="sequences, from the least to the most drift")
        whole_numbers(axis)
        axis.yaxis.set_major_formatter(percent)
    return svg[0]


def by_layer(series: Sequence[Series], *, measure: Literal["error", "KL"], name: str, title: str) -> str:
    """Of each decoder layer the relative error of the residual stream behind it, or the KL that it adds alone."""
    with picture(name, title) as (axis, svg):
        for one in series:
            axis.plot(range(len(one.values)), one.values, marker=marker(one), **line(one))
        said = "mean KL, nats a token" if measure == "KL" else "relative error of the residual stream"
        axis.set(title=said, xlabel="decoder layer", ylim=(0, None))
        whole_numbers(axis)
        if measure == "error":
            axis.yaxis.set_major_formatter(percent)
    return svg[0]


def by_position(series: Sequence[Series], *, measure: Literal["KL", "drift"], name: str, title: str) -> str:
    """Mean KL or drift in bins of positions; `values` are pairs (first position of the bin, nats or a fraction)."""
    with picture(name, title) as (axis, svg):
        for one in series:
            positions, means = zip(*one.values, strict=True)
            axis.plot(positions, means, marker=marker(one) if len(means) < 40 else None, **line(one))
        axis.set(xlabel="position in the sequence, tokens")
        if measure == "KL":
            axis.set(title="mean KL, nats a token", ylim=(0, None))
        else:
            axis.set(title="drift of the perplexity")
            axis.yaxis.set_major_formatter(percent)
        axis.set_xscale("log", base=2)  # bins double in width
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return svg[0]


def kl_histogram(series: Sequence[Series], marks: Sequence[tuple[str, float]], *, name: str, title: str) -> str:
    """How many tokens have how much KL; `values` are (edges, counts), `marks` are places worth a line of their own."""
    with picture(name, title) as (axis, svg):
        for one in series:
            edges, counts = one.values
            shares = np.asarray(counts) / max(sum(counts), 1)
            if len(series) == 1:
                axis.stairs(shares, edges, fill=True, color=color(one.place), alpha=0.25)
            axis.stairs(shares, edges, **line(one))
        for place, (word, value) in enumerate(marks):
            axis.axvline(value, color=INK, linewidth=0.8, linestyle="dotted")
            axis.annotate(
                word, (value, 1), xycoords=("data", "axes fraction"), xytext=(3, -9 - 12 * place),
                textcoords="offset points", fontsize=9,
            )  # fmt: skip
        axis.set(title="share of tokens", xlabel="KL of a token, nats", xscale="log")
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1] if marks else None)  # the marks' words stand above the hill
        axis.xaxis.set_major_formatter(lambda value, _: _power(value))
        axis.xaxis.set_minor_locator(_nothing())
        axis.yaxis.set_major_formatter(percent)
    return svg[0]


def acceptance_by_position(series: Sequence[Series], *, name: str, title: str) -> str:
    """How often the draft's token at each position was accepted."""
    with picture(name, title) as (axis, svg):
        width = 0.8 / len(series)
        for number, one in enumerate(series):
            places = [k + 1 + (number - (len(series) - 1) / 2) * width for k in range(len(one.values))]
            bars(axis, places, one.values, one.place, lambda v: f"{v:.1%}", width=width * 0.92)
            if len(series) == 1:
                for x, value in zip(places, one.values, strict=True):
                    axis.annotate(f"{value:.0%}", (x, value), (0, 3), textcoords="offset points", ha="center")
        axis.set(title="accepted, of all drafts", xlabel="position in the draft", ylim=(0, 1))
        whole_numbers(axis)
        axis.yaxis.set_major_formatter(percent)
    return svg[0]


def error_by_linear(
    errors: dict[tuple[str, int], float], *, largest: float, place: int, name: str, title: str
) -> str:  # fmt: skip
    """A map of relative errors, kinds of linears down, layers across; full color is an error of `largest`."""
    from matplotlib.patches import Rectangle

    kinds = list(dict.fromkeys(kind for kind, _ in errors))
    layers = 1 + max(layer for _, layer in errors)
    with picture(name, title, height=0.9 + 0.28 * len(kinds)) as (axis, svg):
        for (kind, layer), error in errors.items():
            cell = Rectangle(
                (layer - 0.5, kinds.index(kind) - 0.44), 0.94 if layers < 60 else 1, 0.88, facecolor=color(place),
                alpha=_shade(error, largest), linewidth=0,
            )  # fmt: skip
            cell.set_gid(f"{TIP}{kind} of layer {layer}: {error:.2%}")
            axis.add_patch(cell)
        axis.set(xlim=(-0.5, layers - 0.5), ylim=(len(kinds) - 0.5, -0.5), xlabel="decoder layer")
        axis.set_yticks(range(len(kinds)), kinds)
        axis.grid(visible=False)
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(length=0)
        whole_numbers(axis)
    return svg[0]


def size_against_kl(series: Sequence[Series], *, name: str, title: str) -> str:
    """Candidates by size and distance, and the line of those that none beats in both; `values` are Points."""
    with picture(name, title) as (axis, svg):
        front = _pareto([one.values for one in series])
        axis.step(
            [p.bits_per_weight for p in front], [p.kl_nats for p in front], where="post", color=MUTED, linewidth=1
        )
        for one in series:
            point: Point = one.values
            if point.interval is not None:
                axis.plot([point.bits_per_weight] * 2, point.interval, color=color(one.place), linewidth=1.2)
            (drawn,) = axis.plot(
                point.bits_per_weight,
                point.kl_nats,
                marker(one),
                color=color(one.place),
                markersize=8,
                markerfacecolor="none",
                markeredgewidth=1.8,  # one of the same size and distance shows through
            )
            drawn.set_gid(f"{TIP}{point.tip}")
        axis.set(title="mean KL, nats a token", xlabel="bits per weight", ylim=(0, None))
        axis.margins(x=0.12)
    return svg[0]


def _pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in size and in distance, by size."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits_per_weight, p.kl_nats)):
        if not found or point.kl_nats < found[-1].kl_nats:
            found.append(point)
    return found


def _shade(error: float, largest: float) -> float:
    """A cell's opacity; the smallest is still seen to be a cell."""
    return 0.06 + 0.94 * min(error / largest, 1) if largest > 0 else 0.06


def _power(value: float) -> str:
    """0.01, 1, 10⁻⁵."""
    exponent = round(float(np.log10(value)))
    return (
        f"{value:g}"
        if -3 < exponent < 4
        else "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()
