"""The rows that `benchmarks/quantizers.py` left in a folder, as Markdown, JSON and a picture.

python benchmarks/quantizers_table.py runs/quantizers
"""

import json
import sys
from pathlib import Path
from typing import Any

KINDS = ("prose", "chat")
NATIVE, OTHER = ("#1f5f99", "#9cc1e0"), ("#8a8a8a", "#cfcfcf")  # prose and chat


def write(folder: Path) -> str:
    """Write table.md, table.json, table.svg and table.png into the folder; returns the Markdown."""
    rows = read(folder)
    text = markdown(rows)
    (folder / "table.md").write_text(text + "\n")
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    if any("prose" in row for row in rows):
        picture(rows, folder)
    return text


def read(folder: Path) -> list[dict[str, Any]]:
    """Every row that has a result, best on prose first, then those that failed."""
    rows = []
    for file in sorted(folder.glob("*/row.json")):
        row = json.loads(file.read_text())
        served = file.with_name("served.json")
        rows.append(row | (json.loads(served.read_text()) if served.exists() else {"served": None}))
    rows.sort(key=lambda row: float(row["prose"]["kl"]))
    failed = [path for path in sorted(folder.glob("*/failed.json")) if not path.with_name("row.json").exists()]
    rows += [json.loads(path.read_text()) for path in failed]
    _label(rows)
    return rows


def _label(rows: list[dict[str, Any]]) -> None:
    """What tells rows of one name apart goes into the name."""
    for key, word in (("group_size", "group"), ("seed", "seed")):
        if len({row[key] for row in rows}) > 1:
            for row in rows:
                row["name"] += f", {word} {row[key]}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table. Memory with <= was not told apart from what the benchmark itself held."""
    lines = [
        "| quantizer | prose KL +- SE | drift | top-1 | chat KL +- SE | drift | top-1 | CPU s | wall s | peak MB | "
        "size MB | vLLM |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row and "prose" not in row:
            said = row["error"].splitlines()[0].replace("|", "\\|")
            lines.append(f"| {row['name']} | did not run ({row['pins']}): {said} |" + " |" * 10)
            continue
        cells = [
            f"{row[kind]['kl']:.4f} +- {row[kind]['kl_se']:.4f} | {row[kind]['drift']:+.1%} | {row[kind]['top1']:.1%}"
            for kind in KINDS
        ]
        cost = f"{row['cpu_s']:.0f} | {row['wall_s']:.0f} | {_peak(row)} | {row['bytes'] / 1e6:.0f}"
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {cost} | {_served(row)} |")
    return "\n".join(lines)


def _peak(row: dict[str, Any]) -> str:
    peak = row.get("peak_memory_bytes")
    return f"{peak / 1e6:.0f}" if peak else f"<= {row['rss_bytes'] / 1e6:.0f}"


def _served(row: dict[str, Any]) -> str:
    if row["served"] is None:
        return "not tried"
    if "error" in row:
        return "refused: " + str(row["error"]).splitlines()[0].replace("|", "\\|")
    distance = row["distance"]["dequantized"]
    return f"served ({distance:.3f})" if row["served"] else f"loads, other numbers ({distance:.3f})"


def picture(rows: list[dict[str, Any]], folder: Path) -> None:
    """Three rows of bars beside each other, best on top: KL, CPU seconds, size; the native engine in blue."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    shown = [row for row in rows if "prose" in row]
    places = range(len(shown))
    colours = [NATIVE if row["name"].startswith("native") else OTHER for row in shown]
    style = {"svg.hashsalt": "quantkit", "svg.fonttype": "none", "font.size": 9}
    with pyplot.rc_context(style):
        figure, (kl, cpu, size) = pyplot.subplots(
            1, 3, figsize=(11, 1.2 + 0.42 * len(shown)), sharey=True, layout="constrained", width_ratios=(5, 3, 2)
        )
        for number, kind in enumerate(KINDS):
            where = [place + (number - 0.5) * 0.38 for place in places]
            values, errors = ([row[kind][key] for row in shown] for key in ("kl", "kl_se"))
            kl.barh(where, values, 0.36, xerr=errors, color=[pair[number] for pair in colours], ecolor="#444444")
        kl.set(xlabel="KL(FP16 || quantized), nats a token", yticks=list(places), xlim=(0, None))
        kl.set_yticklabels([row["name"] for row in shown])
        patches = [
            Patch(color=pair[number], label=f"{who}, {kind}")
            for who, pair in (("native", NATIVE), ("others", OTHER))
            for number, kind in enumerate(KINDS)
        ]
        kl.legend(handles=patches, frameon=False, loc="upper right")
        for axis, label, values, log in (
            (cpu, "CPU seconds", [row["cpu_s"] for row in shown], True),
            (size, "size, MB", [row["bytes"] / 1e6 for row in shown], False),
        ):
            bars = axis.barh(places, values, 0.6, color=[pair[0] for pair in colours], log=log)
            axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
            axis.set(xlabel=label)
            axis.margins(x=0.25)
        kl.invert_yaxis()
        for axis in (kl, cpu, size):
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / "table.svg", metadata={"Date": None})
        figure.savefig(folder / "table.png", dpi=150)
        pyplot.close(figure)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
