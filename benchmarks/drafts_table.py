"""The rows that `benchmarks/drafts.py` left in a folder, as Markdown, JSON and a picture.

python benchmarks/drafts_table.py runs/drafts
"""

import json
import sys
from pathlib import Path
from typing import Any

from quantkit.draft.acceptance import Acceptance, gain

MEASURED = ("0 greedy", "0.7 greedy", "0.7 sampled")  # temperature, proposals
SHORT, LONG = "LK hybrid", "long, LK hybrid"  # what rows of one epoch, and of more, are compared with


def write(folder: Path) -> str:
    """Write table.md, table.json, table.svg and table.png into the folder; returns the Markdown."""
    rows, starts = read(folder), read_starts(folder)
    text = f"{markdown(rows)}\n\n{starts_markdown(starts)}"
    (folder / "table.md").write_text(text + "\n")
    (folder / "table.json").write_text(json.dumps({"rows": rows, "starts": starts}, indent=2) + "\n")
    if rows:
        picture(rows, starts, folder)
    return text


def read(folder: Path) -> list[dict[str, Any]]:
    """Every row that has a result, longest accepted length first."""
    rows = []
    for file in folder.glob("*/row.json"):
        row, counted = json.loads(file.read_text()), file.with_name("vllm.json")
        row["vllm"] = json.loads(counted.read_text()) if counted.exists() else None
        if row["acceptance"] or row["vllm"]:
            rows.append(row)
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        other = by_name.get(SHORT if row["epochs"] == 1 else LONG)
        if row["acceptance"] and other not in (None, row):
            row["gains"] = {key: gain(_texts(row, *key.split()), _texts(other, *key.split())) for key in MEASURED}
    return sorted(rows, key=lambda row: -float(_found(row)["accepted_length"]))


def _texts(row: dict[str, Any], heat: str, proposals: str) -> list[Acceptance]:
    return [Acceptance(drafts, 0, accepted, []) for drafts, accepted in row["acceptance"][heat]["texts"][proposals]]


def _found(row: dict[str, Any]) -> dict[str, Any]:
    """The acceptance at temperature 0: by the logits, or by vLLM where there are none."""
    found: dict[str, Any] = row["acceptance"]["0"]["greedy"] if row["acceptance"] else row["vllm"]
    return found


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Where drafts start, and what that gives before any training."""
    found = [json.loads(file.read_text()) | {"name": file.parent.name} for file in folder.glob("starts/*/start.json")]
    return sorted(found, key=lambda start: -float(start["initial"]["greedy"]["accepted_length"]))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: acceptance on the held-out prompts by the logits, at temperatures 0 and 0.7, and by vLLM at 0."""
    lines = [
        "| draft | tokens x epochs | CPU s | accepted length at 0 | gain | by position | vLLM | at 0.7, greedy | "
        "at 0.7, sampled | gain | sum min(p, q) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        made, gains = row["acceptance"], row.get("gains", {})
        cells = [
            row["name"], f"{row['tokens']:,} x {row['epochs']}", f"{row['epochs_cpu_s'][-1]:,.0f}",
            _length(made["0"]["greedy"]) if made else "", _gain(gains.get("0 greedy")),
            " ".join(f"{share:.2f}".lstrip("0") for share in _found(row)["per_position"]),
            f"{row['vllm']['accepted_length']:.2f}" if row["vllm"] else "not asked",
            *((_length(made["0.7"][how]) for how in ("greedy", "sampled")) if made else ("", "")),
            _gain(gains.get("0.7 sampled")), f"{made['0.7']['overlap']:.3f}" if made else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def starts_markdown(starts: list[dict[str, Any]]) -> str:
    """The table of where drafts start: which layers, and what they give untouched and fitted."""
    lines = ["| start | layers | CPU s | accepted length, untouched | fitted |", "|---|---|---|---|---|"]
    for start in starts:
        lengths = [_length(start[when]["greedy"]) for when in ("layers", "initial")]
        lines.append(
            f"| {start['name']} | {' '.join(map(str, start['kept']))} | {start['cpu_s']:,.0f} | {' | '.join(lengths)} |"
        )
    return "\n".join(lines)


def _length(found: dict[str, Any]) -> str:
    return f"{found['accepted_length']:.2f} +- {found['accepted_length_error']:.2f}"


def _gain(found: tuple[float, float] | None) -> str:
    return f"{found[0]:+.3f} +- {found[1]:.3f}" if found else ""


def picture(rows: list[dict[str, Any]], starts: list[dict[str, Any]], folder: Path) -> None:
    """Accepted lengths of all rows; and how they grow with what a draft of the same start has learned from."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    by_start = {start["name"]: start for start in starts}
    base = next((row for row in rows if row["name"] == SHORT), None)
    same = ("start", "loss", "learning_rate", "batch_size", "temperature", "on_prompts")
    grown = [row for row in rows if base and row.get("start") and all(row[key] == base[key] for key in same)]
    with pyplot.rc_context({"svg.hashsalt": "quantkit", "svg.fonttype": "none", "font.size": 9}):
        figure, (bars, curve) = pyplot.subplots(
            1, 2, figsize=(10, 0.26 * len(rows) + 1.4), layout="constrained", width_ratios=(3, 2)
        )
        found = [_found(row) for row in rows]
        bars.barh(
            [row["name"] for row in rows], [each["accepted_length"] - 1 for each in found], left=1,
            color=["#1f5f99" if row["epochs"] == 1 else "#123b61" for row in rows],
            xerr=[each["accepted_length_error"] for each in found], error_kw={"elinewidth": 0.8, "capsize": 2},
        )  # fmt: skip
        bars.invert_yaxis()
        bars.set(xlabel="accepted length on held-out prompts, temperature 0, 4 draft tokens")
        if base is not None:
            begin = by_start[base["start"]]["initial"]["greedy"]
            points = sorted((row["tokens"] * row["epochs"] / 1000, row["acceptance"]) for row in grown)
            curves = {
                "temperature 0": [(0, begin), *((x, made["0"]["greedy"]) for x, made in points)],
                "0.7, sampled proposals": [(x, made["0.7"]["sampled"]) for x, made in points],
                "0.7, greedy proposals": [(x, made["0.7"]["greedy"]) for x, made in points],
            }
            for (label, line), color in zip(curves.items(), ("#1f5f99", "#c05a1c", "#6b8e3c"), strict=True):
                curve.errorbar(
                    [x for x, _ in line], [each["accepted_length"] for _, each in line],
                    yerr=[each["accepted_length_error"] for _, each in line], marker="o", markersize=3, capsize=2,
                    linewidth=1.2, elinewidth=0.8, color=color, label=label,
                )  # fmt: skip
            curve.set(xlabel="thousand tokens learned from (0: fitted alone)", ylabel="accepted length", xlim=(0, None))
            curve.legend(frameon=False, fontsize=8)
        for axis in (bars, curve):
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / "table.svg", metadata={"Date": None})
        figure.savefig(folder / "table.png", dpi=150)
        pyplot.close(figure)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
