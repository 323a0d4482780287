"""GPTQModel's GPTQ, GPTAQ and AWQ as one process: `python -I gptqmodel.py JOB_DIR`, job.json in, result.json out."""

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
    # Its pool of threads has half as many workers as the machine has cores, and fails where two of them, which loading
    # a model reserves, are more than that. It reads the number at its import.
    workers = max(2, job["threads"])
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(workers)
    import gptqmodel  # noqa: F401 (imported here to be counted as an import)

    import_cpu_s = time.process_time()
    notes = [f"GPTQMODEL_CPU_WORKERS={workers}, because it fails with one worker, its default on two cores"]
    notes += quantize(job)
    result = {
        "engine": "gptqmodel", "version": version("gptqmodel"), "method": job["method"],
        "format": "awq" if job["method"] == "awq" else "gptq",
        "import_cpu_s": import_cpu_s, "notes": notes,
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
    """Write the quantized checkpoint; returns what was patched besides the number of workers."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization import FORMAT, METHOD, GPTAQConfig
    from safetensors.torch import load_file
    from transformers import set_seed

    notes = []
    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    scheme, source, out = job["scheme"], Path(job["checkpoint"]), Path(job["out"])
    # Its other ways to pack are compiled at their first use, with a compiler that may not be there.
    own = {
        "gptq": {"pack_impl": "original"},
        "gptaq": {"pack_impl": "original", "gptaq": GPTAQConfig()},
        "awq": {"method": METHOD.AWQ, "format": FORMAT.GEMM},
    }[job["method"]]
    config = QuantizeConfig(
        bits=scheme["bits"], group_size=scheme["group_size"], sym=scheme["symmetric"], desc_act=False,
        device=job["device"], offload_to_disk=False, **own, **job["options"],
    )  # fmt: skip
    if job["method"] == "awq" and job["device"] == "cpu":
        # Packing asks its AWQ linear whether that multiplies the model's type, which here it is never asked to.
        AwqTorchLinear.SUPPORTS_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
        notes.append("its check that AWQ packs from 16 bits alone is widened to float32")
    # On a CPU the engine would load bfloat16, which cuts the FP16 weights and which most processors multiply many times
    # more slowly than float32.
    engine = GPTQModel.load(str(source), config, dtype=torch.float32 if job["device"] == "cpu" else torch.float16)
    windows = load_file(job["tokens"])["input_ids"]
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
    # as they are, in their order: the engine would sort them, and leave out those of ten tokens or fewer
    engine.quantize(batches, batch_size=1, calibration_sort=None, calibration_data_min_length=0)

    if job["method"] != "awq" and restore_zero_points(engine.model, scheme["bits"]):
        notes.append("zero points that it spoils beside a zero point 0 are stored as they were")
    engine.model.to(torch.float16)
    engine.save(str(out))
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
