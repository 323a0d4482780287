"""A plan as files: plan.json for machines, plan.md and plan.html for people."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import artifacts
from quantkit.capacity import tables
from quantkit.capacity.claims import Judged
from quantkit.capacity.latency import Point
from quantkit.capacity.planning import Plan
from quantkit.pages import frame
from quantkit.pages.figures import MUTED, Series, line, marker, picture


class _Figure(NamedTuple):
    title: str
    caption: str
    svg: str


def write(out: Path, plan: Plan, judged: Sequence[Judged]) -> None:
    """Write the three files into `out`, which is made; those of an earlier plan are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    claims = [one._asdict() for one in judged]
    artifacts.write_json(out / "plan.json", plan.model_dump(mode="json") | {"claims": claims})
    artifacts.write_text(out / "plan.md", tables.markdown(plan, judged))
    names = {place: column.name for place, column in enumerate(plan.columns) if column.points}
    page = frame.render(
        "quantkit.capacity", "plan.html.j2", plan=plan, head=tables.head(plan), tables=tables.tables(plan, judged),
        remarks=tables.remarks(plan), figures=_figures(plan), names=names,
    )  # fmt: skip
    artifacts.write_text(out / "plan.html", page)


def _figures(plan: Plan) -> list[_Figure]:
    lines = f"thin lines speculate, the upright one stands at {plan.question.users} users."
    return [
        _Figure(
            "Seconds from token to token", f"Of each sequence, by how many are decoded at once; {lines}",
            _picture(plan, "itl", "milliseconds a token", lambda p: p.itl_s * 1e3,
                     lambda p: None if p.speculative_itl_s is None else p.speculative_itl_s * 1e3),
        ),
        _Figure(
            "Tokens a second of all", f"Decoding alone, prompts not counted; {lines}",
            _picture(plan, "rate", "tokens/s", lambda p: p.tokens_per_s, lambda p: p.speculative_tokens_per_s),
        ),
    ]  # fmt: skip


def _picture(
    plan: Plan, name: str, said: str, plain: Callable[[Point], float], speculative: Callable[[Point], float | None]
) -> str:
    with picture(name, said) as (axis, svg):
        for place, column in enumerate(plan.columns):
            if not column.points:
                continue
            series = Series(place, None)
            sizes = [point.sequences for point in column.points]
            axis.plot(sizes, [plain(point) for point in column.points], marker=marker(series), **line(series))
            _thin(axis, sizes, [speculative(point) for point in column.points], series)
        axis.axvline(plan.question.users, color=MUTED, linewidth=0.8)
        axis.set(title=said, xlabel="sequences at once")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter(lambda value, _: f"{value:g}")
    return svg[0]


def _thin(axis: Any, sizes: Sequence[int], values: Sequence[float | None], series: Series) -> None:
    if values and values[0] is not None:
        axis.plot(sizes, values, marker=marker(series), **(line(series) | {"linewidth": 0.7, "markersize": 2}))
