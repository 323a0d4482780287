"""GPTQModel's GPTQ and GPTAQ as one process: `python -I gptqmodel.py JOB_DIR`, job.json in, result.json out."""

import json
import os
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
              "chat_template*", "generation_config.json")  # fmt: skip


def main(folder: Path) -> None:
    """Run the job in `folder`; result.json appears only when the checkpoint is whole."""
    started = time.monotonic()
    job = json.loads((folder / "job.json").read_bytes())
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    # Its pool of threads has half as many workers as the machine has cores, and fails where two of them, which loading
    # a model reserves, are more than that. It reads the number at its import.
    workers = max(2, job["threads"])
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(workers)
    import gptqmodel  # noqa: F401 (imported here to be counted as an import)

    import_cpu_s = cpu_seconds()
    notes = [f"GPTQMODEL_CPU_WORKERS={workers}, because it fails with one worker, its default on two cores"]
    notes += quantize(job)
    cpu_s = cpu_seconds()
    result = {
        "engine": "gptqmodel", "version": version("gptqmodel"), "method": job["method"], "format": "gptq",
        "cpu_s": cpu_s, "import_cpu_s": import_cpu_s, "quantize_cpu_s": cpu_s - import_cpu_s,
        "wall_s": time.monotonic() - started,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "notes": notes,
    }  # fmt: skip
    temporary = folder / ".result.json.tmp"
    temporary.write_text(json.dumps(result, indent=2))
    temporary.replace(folder / "result.json")


def cpu_seconds() -> float:
    """User and system seconds of this process and of the children it has waited for, since it started."""
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def quantize(job: dict[str, Any]) -> list[str]:
    """Write the quantized checkpoint; returns what was patched besides the number of workers."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import GPTAQConfig
    from safetensors.torch import load_file
    from transformers import set_seed

    notes = []
    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    scheme, source, out = job["scheme"], Path(job["checkpoint"]), Path(job["out"])
    gptaq = {"gptq": None, "gptaq": GPTAQConfig()}[job["method"]]
    # Its other ways to pack are compiled at their first use, with a compiler that may not be there.
    config = QuantizeConfig(
        bits=scheme["bits"], group_size=scheme["group_size"], sym=scheme["symmetric"], desc_act=False, gptaq=gptaq,
        device=job["device"], offload_to_disk=False, pack_impl="original", **job["options"],
    )  # fmt: skip
    # On a CPU the engine would load bfloat16, which cuts the FP16 weights and which most processors multiply many times
    # more slowly than float32.
    engine = GPTQModel.load(str(source), config, dtype=torch.float32 if job["device"] == "cpu" else torch.float16)
    windows = load_file(job["tokens"])["input_ids"]
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
    # as they are, in their order: the engine would sort them, and leave out those of ten tokens or fewer
    engine.quantize(batches, batch_size=1, calibration_sort=None, calibration_data_min_length=0)

    if restore_zero_points(engine.model, scheme["bits"]):
        notes.append("zero points that it spoils beside a zero point 0 are stored as they were")
    engine.model.to(torch.float16)
    engine.save(str(out))
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)
    return notes


def restore_zero_points(model: Any, bits: int) -> bool:
    """Store each zero point less 1 by itself, as readers expect; True where that changes anything.

    The engine takes 1 from all that share an int32 at once, and the borrow of a zero point 0 spoils its neighbour.
    """
    import torch

    changed = False
    shifts = torch.arange(0, 32, bits)
    for name, buffer in model.named_buffers():
        if name.endswith(".qzeros"):
            together = buffer.long().cpu() + sum(1 << shift for shift in shifts.tolist())
            zero_points = (together[..., None] >> shifts) % 2**bits
            stored = (((zero_points - 1) % 2**bits) << shifts).sum(-1).to(buffer)
            changed |= not torch.equal(stored, buffer)
            with torch.inference_mode():  # in which the engine made it
                buffer.copy_(stored)
    return changed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
