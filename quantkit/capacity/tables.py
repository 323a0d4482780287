"""A plan as tables of words, for the terminal, for Markdown and for a page alike."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from quantkit.capacity.claims import Judged
from quantkit.capacity.cost import Cost
from quantkit.capacity.latency import MOST_SEQUENCES, Point
from quantkit.capacity.planning import Column, Plan
from quantkit.progress import spoken

_NONE = "-"


class Table(NamedTuple):
    """Cells are words; the first of each row names it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(plan: Plan, judged: Sequence[Judged] = ()) -> list[Table]:
    """Everything that a plan says, in the order in which it is asked."""
    found = [_fits(plan), _speed(plan), _flags(plan), _costs(plan)]
    if plan.durations:
        found.append(_stages(plan))
    if judged:
        found.append(claims(judged))
    return found


def head(plan: Plan) -> str:
    """What is planned, in a line."""
    asked = plan.question
    return (
        f"{plan.model}, {plan.parameters / 1e9:.2f}B weights, on {asked.gpus} x {plan.gpu.title}: {asked.users} users, "
        f"{asked.context} tokens each ({asked.prompt_tokens} of prompt, {asked.answer_tokens} of answer)"
    )


def remarks(plan: Plan) -> list[str]:
    """What a reader must know besides the tables."""
    source = plan.gpu.source
    told = [
        "Estimates, not measurements. Seconds are bounds from below: what bytes take at full bandwidth, or operations "
        "at their peak. Exact are KV bytes a token, and blocks for given cache bytes."
        if plan.gpu.measured is None else
        "Estimates from products that were measured here; blocks for given cache bytes are exact.",
        *([f"GPU: {source.title}, {source.url}"] if source else []),
    ]  # fmt: skip
    if plan.draft is not None:
        told.append(f"Draft: {plan.draft}; {plan.accepted_length:.2f} tokens a step, by {plan.accepted_from}.")
    told += [f"{note[0].upper()}{note[1:]}." for note in plan.notes]
    if any(column.chosen and column.chosen.replicas * column.chosen.ranks > plan.gpu.gpus_per_node
           for column in plan.columns):  # fmt: skip
        told.append(f"Replicas stand on several nodes of {plan.gpu.gpus_per_node} GPUs; none spans two.")
    return told


def claims(judged: Sequence[Judged]) -> Table:
    """Claims beside what the arithmetic allows."""
    rows = [(one.claim, one.said, one.arithmetic, one.verdict) for one in judged]
    return Table("Claims", ("claim", "said", "what the arithmetic allows", "verdict"), rows)


def seconds(value: float) -> str:
    """Seconds in words, in milliseconds below ten."""
    return f"{value:.1f} s" if value >= 10 else f"{value * 1e3:,.3g} ms" if value < 0.1 else f"{value * 1e3:,.0f} ms"


def gigabytes(value: float) -> str:
    """Bytes in billions, and small ones in millions."""
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def _row(plan: Plan, name: str, tell: Callable[[Column], str | None]) -> list[str]:
    return [name, *(tell(column) or _NONE for column in plan.columns)]


def _headers(plan: Plan, first: str) -> list[str]:
    return [first, *(column.name for column in plan.columns)]


def _fits(plan: Plan) -> Table:
    def of_layout(tell: Callable[[Column], str]) -> Callable[[Column], str | None]:
        return lambda column: tell(column) if column.layouts else None

    def sized(tell: Callable[..., str]) -> Callable[[Column], str | None]:
        return lambda column: tell((column.chosen or column.layouts[-1]).sizing) if column.layouts else None

    rows = [_row(plan, "weights", lambda c: gigabytes(c.stored_bytes))]
    rows.append(_row(plan, "replicas x GPUs each (TP)", lambda c: f"{c.chosen.replicas} x {c.chosen.ranks}"
                     if c.chosen else "does not fit"))  # fmt: skip
    rows.append(_row(plan, "weights on a GPU", sized(lambda s: gigabytes(s.target_weight_bytes))))
    if plan.draft:
        rows.append(_row(plan, "draft on a GPU", sized(lambda s: gigabytes(s.draft_weight_bytes))))
    rows += [
        _row(plan, "activations, runtime (estimates)", of_layout(lambda c: " + ".join(
            gigabytes(part) for layout in [c.chosen or c.layouts[-1]]
            for part in (layout.activation_bytes, layout.runtime_bytes)))),
        _row(plan, "left for the KV cache of a GPU", sized(lambda s: gigabytes(s.kv_cache_bytes))),
        _row(plan, "KV bytes a token of a GPU", sized(lambda s: f"{s.kv_bytes_per_token:,}")),
        _row(plan, "KV of one context, all GPUs of it", sized(
            lambda s: f"{s.kv_bytes_per_token * s.tensor_parallel_size * s.max_model_len / 2**30:.3f} GiB")),
        _row(plan, "KV blocks a replica", sized(lambda s: f"{s.num_blocks:,} of {s.block_size} tokens")),
        _row(plan, "contexts at once, a replica", sized(lambda s: f"{s.concurrency:.2f}")),
        _row(plan, "contexts at once, all", lambda c: f"{c.chosen.sequences:,}" if c.chosen else "0"),
        _row(plan, "so", lambda c: c.why),
    ]  # fmt: skip
    others = {column.name: [one for one in column.layouts if column.chosen and one != column.chosen]
              for column in plan.columns}  # fmt: skip
    if any(others.values()):
        rows.append(_row(plan, "instead (replicas x TP: contexts)", lambda c: ", ".join(
            f"{one.replicas} x {one.ranks}: {one.sequences:,}" for one in others[c.name])))  # fmt: skip
    return Table("What fits", _headers(plan, "memory"), rows)


def _speed(plan: Plan) -> Table:
    sizes = sorted({point.sequences for column in plan.columns for point in column.points})
    rows = [
        _row(plan, "TTFT alone", lambda c: None if c.ttft_s is None else seconds(c.ttft_s)),
        _row(
            plan,
            "TTFT of the last, all users at once",
            lambda c: None if c.last_ttft_s is None else seconds(c.last_ttft_s),
        ),
    ]
    for size in sizes:
        at = {c.name: next((p for p in c.points if p.sequences == size), None) for c in plan.columns}
        rows.append(_row(plan, f"ITL, {size} at once", lambda c, at=at: _told(at[c.name])))  # type: ignore[misc]
        if plan.draft:
            rows.append(_row(plan, "  speculating", lambda c, at=at: _speculated(at[c.name])))  # type: ignore[misc]
    if plan.draft:
        rows.append(_row(plan, "speculation loses from", _loses))
    how = "at best" if plan.gpu.measured is None else "by what was measured here"
    return Table(f"How fast {how}, a replica: seconds a token, tokens/s of all", _headers(plan, "time"), rows)


def _loses(column: Column) -> str | None:
    if not column.points:
        return None
    size = column.speculation_loses_from
    if size is None:
        return f"not up to {MOST_SEQUENCES:,} at once"
    fitting = math.floor(column.chosen.sizing.concurrency) if column.chosen else 0
    return f"{size} at once" + (f", more than the {fitting} that fit" if size > fitting else "")


def _told(point: Point | None) -> str | None:
    return None if point is None else f"{seconds(point.itl_s)}, {point.tokens_per_s:,.0f}/s"


def _speculated(point: Point | None) -> str | None:
    if point is None or point.speculative_itl_s is None or point.speculative_tokens_per_s is None:
        return None
    said = f"{seconds(point.speculative_itl_s)}, {point.speculative_tokens_per_s:,.0f}/s, {point.speedup:.2f} x"
    return said if (point.speedup or 0) >= 1 else f"{said}: slower"


def _flags(plan: Plan) -> Table:
    def flag(name: str) -> Callable[[Column], str | None]:
        return lambda c: str(getattr(c.limits, name)) if c.limits else None

    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "max_num_queued_tokens")
    rows = [_row(plan, f"--{name.replace('_', '-')}", flag(name)) for name in names]
    rows.insert(0, _row(plan, "--tensor-parallel-size", lambda c: str(c.chosen.ranks) if c.chosen else None))
    rows.insert(1, _row(plan, "--kv-cache-dtype", lambda c: c.kv_cache))
    return Table(f"vLLM's limits for a replica, for a TTFT up to {plan.question.ttft_limit_s:g} s",
                 _headers(plan, "flag"), rows)  # fmt: skip


def _costs(plan: Plan) -> Table:
    price = plan.question.price_per_hour

    def told(tell: Callable[[Cost], float | None], spell: str) -> Callable[[Column], str | None]:
        def tell_both(column: Column) -> str | None:
            found = [tell(one) for one in (column.cost, column.speculative_cost) if one is not None]
            return ", speculating ".join(format(one, spell) for one in found if one is not None) or None

        return tell_both

    rows = [_row(plan, "answer tokens/s, all", told(lambda c: c.answer_tokens_per_s, ",.0f"))]
    if price is None:
        rows.append(["$ for 1M answer tokens", *(["give --price-per-hour"] * len(plan.columns))])
    else:
        rows.append(_row(plan, "$ for 1M answer tokens", told(lambda c: c.per_million_answer_tokens, ".3g")))
        rows.append(_row(plan, "$ for 1M tokens, prompts too", told(lambda c: c.per_million_tokens, ".3g")))
    served = " and ".join(sorted({str(math.ceil(c.limits.max_num_seqs)) for c in plan.columns if c.limits}))
    paid = "" if price is None else f", at ${price:g} a GPU and hour"
    return Table(f"Always {served} at once a replica, prompts read between{paid}", _headers(plan, "at best"), rows)


def _stages(plan: Plan) -> Table:
    counts = list(dict.fromkeys(one.gpus for one in plan.durations))
    rows = []
    for stage in dict.fromkeys(one.stage for one in plan.durations):
        each = [one for one in plan.durations if one.stage == stage]
        last = each[-1]
        shared = last.shared_s or 0.0
        parts = [
            (shared, "shared out"), (last.everywhere_s, "not shared out"), (last.links_s, "links"),
            (last.disk_s, "reading weights"),
        ]  # fmt: skip
        rows.append([
            stage, last.work, *(_NONE if one.seconds is None else spoken(one.seconds) for one in each),
            f"{max(parts)[1]}: {max(parts)[0] / (last.seconds or 1):.0%}" if last.seconds else _NONE,
        ])  # fmt: skip
    names = [f"{count} GPU{'s' if count > 1 else ''}" for count in counts]
    return Table("How long the stages take at best", ("stage", "work", *names, f"most of it on {counts[-1]}"), rows)


def markdown(plan: Plan, judged: Sequence[Judged]) -> str:
    """The whole plan as Markdown."""
    lines = [f"# Plan: {plan.model}", "", f"{head(plan)}.", ""]
    for table in tables(plan, judged):
        lines += [f"## {table.title}", "", *_markdown_rows(table), ""]
    lines += [f"- {remark}" for remark in remarks(plan)]
    lines += ["", "## Formulas", "", *(f"- **{name}**: {text}" for name, text in plan.formulas.items()), ""]
    return "\n".join(lines)


def _markdown_rows(table: Table) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |"

    return [row(table.headers), "|" + "---|" * len(table.headers), *map(row, table.rows)]
