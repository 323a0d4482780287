"""The rows that `benchmarks/drafts.py` left in a folder, as Markdown, JSON and a picture.

python benchmarks/drafts_table.py runs/drafts
"""

import json
import sys
from pathlib import Path
from typing import Any


def write(folder: Path) -> str:
    """Write table.md, table.json, table.svg and table.png into the folder; returns the Markdown."""
    rows = read(folder)
    text = markdown(rows)
    (folder / "table.md").write_text(text + "\n")
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    if rows:
        picture(rows, folder)
    return text


def read(folder: Path) -> list[dict[str, Any]]:
    """Every row that has a result, longest accepted length first."""
    rows = []
    for file in folder.glob("*/row.json"):
        row = json.loads(file.read_text())
        for when, found in row["acceptance"].items():
            counted = file.with_name(f"vllm-{when}.json")
            found["vllm"] = json.loads(counted.read_text()) if counted.exists() else None
        rows.append(row)
    return sorted(rows, key=lambda row: -float(row["acceptance"]["made"]["0"]["greedy"]["accepted_length"]))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: acceptance on the held-out prompts by the logits, at temperatures 0 and 0.7, and by vLLM at 0."""
    lines = [
        "| trained by | tokens x epochs | CPU s | before | fitted | accepted length +- SE | first token | vLLM | "
        "at 0.7, greedy | at 0.7, sampled | sum min(p, q) | p(argmax q) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        made = row["acceptance"]["made"]
        cold, warm, vllm = made["0"], made["0.7"], made["vllm"]
        before = [row["acceptance"][when]["0"]["greedy"] for when in ("layers", "initial")]
        cells = [
            row["name"], f"{row['tokens']:,} x {row['epochs']}", f"{row['epochs_cpu_s'][-1]:,.0f}",
            *(f"{each['accepted_length']:.2f}" for each in before), _length(cold["greedy"]),
            f"{cold['greedy']['per_position'][0]:.1%}", f"{vllm['accepted_length']:.2f}" if vllm else "not asked",
            _length(warm["greedy"]), _length(warm["sampled"]), f"{warm['overlap']:.3f}", f"{warm['top']:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _length(found: dict[str, Any]) -> str:
    return f"{found['accepted_length']:.2f} +- {found['accepted_length_error']:.2f}"


def picture(rows: list[dict[str, Any]], folder: Path) -> None:
    """Accepted lengths of all rows, and how those of several epochs grew with the seconds spent."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    curves = [row for row in rows if row["epochs"] > 1]
    with pyplot.rc_context({"svg.hashsalt": "quantkit", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(
            1, 2 if curves else 1, figsize=(10 if curves else 5.5, 0.3 * len(rows) + 1.6), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        bars, found = axes[0][0], [row["acceptance"]["made"]["0"]["greedy"] for row in rows]
        bars.barh(
            [row["name"] for row in rows], [each["accepted_length"] - 1 for each in found], left=1, color="#1f5f99",
            xerr=[each["accepted_length_error"] for each in found], error_kw={"elinewidth": 0.8, "capsize": 2},
        )  # fmt: skip
        bars.invert_yaxis()
        bars.set(xlabel="accepted length on held-out prompts, temperature 0, 4 draft tokens")
        if curves:
            for place, row in enumerate(curves):
                axes[0][1].plot(
                    [second / 60 for second in row["epochs_cpu_s"]], row["lengths"], marker="o", markersize=3,
                    color=pyplot.get_cmap("viridis")(0.9 * place / max(len(curves) - 1, 1)), label=row["name"],
                )  # fmt: skip
            axes[0][1].set(xlabel="CPU minutes of training", ylabel="accepted length on validation prompts")
            axes[0][1].legend(frameon=False, fontsize=8)
        for axis in axes[0]:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / "table.svg", metadata={"Date": None})
        figure.savefig(folder / "table.png", dpi=150)
        pyplot.close(figure)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
