"""Pictures as inline SVG that takes the page's colors and the page's font.

matplotlib draws with the colors of a light page. What leaves here names them as CSS variables, with the light color for
a reader that knows none, and the text's color is `currentColor`: one picture reads on light and on dark paper.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

# A candidate's color: what the page's --c1 to --c8 are on light paper. Neighbours differ in their dashes too.
SERIES_COLORS = ("#2467b3", "#c2570c", "#0f7f6b", "#b0338a", "#8a6d00", "#6a4fc0", "#59636e", "#0a7ea4")
DASHES = ("solid", "dashed", "dotted")  # words that matplotlib and CSS share
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, MUTED, RULE = "#1c2024", "#5b6570", "#e3e6e9"
_VARIABLES = {INK: "currentColor", MUTED: f"var(--muted, {MUTED})", RULE: f"var(--rule, {RULE})"} | {
    color: f"var(--c{place}, {color})" for place, color in enumerate(SERIES_COLORS, 1)
}
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5, "axes.titlesize": 9.5, "text.color": INK,
    "axes.titlecolor": MUTED, "axes.labelcolor": MUTED, "axes.edgecolor": MUTED, "axes.titlelocation": "left",
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
    "ytick.minor.size": 0, "axes.axisbelow": True, "grid.color": RULE, "lines.linewidth": 1.6, "lines.markersize": 3.5,
    "lines.solid_joinstyle": "round", "axes.titlepad": 8,
}  # fmt: skip
_WIDTH, HEIGHT = 4.4, 2.75  # inches: 317 points, a phone's width, so that letters keep their size there
TIP = "tip: "


class Series(NamedTuple):
    """What one candidate gives to a picture; `place` among all candidates picks its color, dashes and marker."""

    place: int
    values: Any


def color(place: int) -> str:
    """The color of the candidate at a place, on light paper."""
    return SERIES_COLORS[place % len(SERIES_COLORS)]


@contextmanager
def picture(name: str, title: str, *, height: float = HEIGHT) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; behind the block the list holds the SVG. `name` is the picture's own on its page."""
    import matplotlib
    from matplotlib.figure import Figure

    svg: list[str] = []
    # The salt makes matplotlib's ids the same in each run and others in each picture: one page holds them all.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"quantkit-{name}"}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axis = figure.subplots()
        axis.grid(visible=True, axis="y")
        yield axis, svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg.append(_inline(buffer.getvalue(), name, title))


def _inline(svg: str, name: str, title: str) -> str:
    """matplotlib's SVG as a part of an HTML page: its ids, colors and letters are the page's."""
    used = set(re.findall(r"#([\w.-]+)[\")]", svg))
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)  # it would style the page
    svg = re.sub(rf'<g id="{TIP}([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(xlink:)?href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: _VARIABLES.get(m[0], m[0]), svg)
    svg = re.sub(r"\s+", " ", svg).replace("> <", ">\n<")
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    words = escape(title)
    head = f'<svg {size[0]} role="img" aria-label="{words}" stroke-linejoin="round" stroke-linecap="butt">'
    return f"{head}<title>{words}</title>{svg[svg.index('>') + 1 :].rstrip()}"


def line(series: Series) -> dict[str, Any]:
    return {"color": color(series.place), "linestyle": DASHES[series.place % len(DASHES)]}


def marker(series: Series) -> str:
    return _MARKERS[series.place % len(_MARKERS)]


def bars(
    axis: Any, places: Sequence[float], values: Sequence[float], place: int, say: Callable[[float], str],
    width: float = 0.8,
) -> None:  # fmt: skip
    for bar, value in zip(axis.bar(places, values, width, color=color(place)), values, strict=True):
        bar.set_gid(f"{TIP}{say(value)}")


def percent(value: float, _: int) -> str:
    return f"{100 * value:.3g}%".replace("-", "\N{MINUS SIGN}")


def whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
