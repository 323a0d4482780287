"""llm-compressor's GPTQ and AWQ as one process: `python -I llmcompressor.py JOB_DIR`, job.json in, result.json out."""

import json
import os
import signal
import stat
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Run the job in `folder`; result.json appears only when the checkpoint is whole."""
    threading.Thread(target=end_with_host, daemon=True).start()
    job = json.loads((folder / "job.json").read_bytes())
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    import llmcompressor.modifiers.gptq
    import llmcompressor.modifiers.transform.awq  # noqa: F401 (imported here to be counted as an import)

    import_cpu_s = time.process_time()
    notes = quantize(job)
    result = {
        "engine": "llmcompressor", "version": version("llmcompressor"), "method": job["method"],
        "format": "compressed-tensors", "import_cpu_s": import_cpu_s, "notes": notes,
    }  # fmt: skip
    temporary = folder / ".result.json.tmp"
    temporary.write_text(json.dumps(result, indent=2))
    temporary.replace(folder / "result.json")


def end_with_host() -> None:
    """Standard input is a pipe that ends with whoever waits for the result: without them nothing is left to do."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)


def quantize(job: dict[str, Any]) -> list[str]:
    """Write the quantized checkpoint; returns what was patched and what the engine did other than asked."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from loguru import logger
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, set_seed

    notes: list[str] = []
    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    # Where a Hessian can not be inverted, GPTQ goes on with round-to-nearest and says so in its log alone.
    logger.add(
        lambda line: notes.append(line.record["message"]), level="WARNING",
        filter=lambda record: "round-to-nearest" in record["message"],
    )  # fmt: skip
    if "awq" in job["method"] and not torch.accelerator.is_available():
        # AWQ pins the activations that it keeps, for faster copies to an accelerator; without one, pinning raises.
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
        notes.append("AWQ keeps its activations in unpinned memory, because pinning needs an accelerator")

    scheme, options = job["scheme"], dict(job["options"])
    weights = QuantizationArgs(
        num_bits=scheme["bits"], type="int", symmetric=scheme["symmetric"], strategy="group",
        group_size=scheme["group_size"],
    )  # fmt: skip
    grid = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    recipes = {
        "gptq": lambda: [GPTQModifier(**grid, **options)],
        "awq": lambda: [AWQModifier(**options), QuantizationModifier(**grid)],
        "awq+gptq": lambda: [AWQModifier(), GPTQModifier(**grid, **options)],
    }
    recipe = recipes[job["method"]]()

    source, out = Path(job["checkpoint"]), Path(job["out"])
    # Most processors multiply float16 many times more slowly than float32.
    dtype = torch.float32 if job["device"] == "cpu" else torch.float16
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(job["device"])
    # A loader of our own passes by the engine's tokenizing, shuffling and truncating: these windows in this order.
    windows = load_file(job["tokens"])["input_ids"]
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # any sequence will do
    # A pass over the model for each modifier, its default, is what AWQ before GPTQ needs: in one pass for both, GPTQ
    # would take its Hessians from the inputs as they were before AWQ scaled them.
    oneshot(model=model, recipe=recipe, dataset=loader, num_calibration_samples=len(batches), pipeline="independent")

    # Saving packs the integers: rounding to float16 moves a weight by far less than half a step of its grid.
    model.to(torch.float16).save_pretrained(out, save_compressed=True)
    return notes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
