"""AutoRound as one process: `python -I autoround.py JOB_DIR`, job.json in, result.json out."""

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
    import auto_round  # noqa: F401 (imported here to be counted as an import)

    import_cpu_s = time.process_time()
    quantize(job)
    result = {
        "engine": "autoround", "version": version("auto-round"), "method": job["method"], "format": packing(job),
        "import_cpu_s": import_cpu_s, "notes": [],
    }  # fmt: skip
    temporary = folder / ".result.json.tmp"
    temporary.write_text(json.dumps(result, indent=2))
    temporary.replace(folder / "result.json")


def end_with_host() -> None:
    """Standard input is a pipe that ends with whoever waits for the result: without them nothing is left to do."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)


def packing(job: dict[str, Any]) -> str:
    """GPTQ files keep zero_point - 1, which readers of an asymmetric grid differ on; AWQ files keep it as it is."""
    return "gptq" if job["scheme"]["symmetric"] else "awq"


def quantize(job: dict[str, Any]) -> None:
    """Write the quantized checkpoint."""
    import torch
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    assert job["method"] == "autoround", job["method"]
    torch.set_num_threads(job["threads"])
    scheme, source, out = job["scheme"], Path(job["checkpoint"]), Path(job["out"])
    windows = load_file(job["tokens"])["input_ids"]
    # A list of batches passes by the engine's own data sets. It drops windows shorter than seqlen and stops after
    # nsamples, so both are the exact size.
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows]
    # Compiling costs more than it saves on a CPU (20 steps of a 135M model: 382 CPU seconds with it, 298 without), and
    # needs a C++ compiler.
    options = ({"enable_torch_compile": False} if job["device"] == "cpu" else {}) | job["options"]
    engine = AutoRound(
        str(source), AutoTokenizer.from_pretrained(source), dataset=batches, nsamples=windows.shape[0],
        scheme=QuantizationScheme(bits=scheme["bits"], group_size=scheme["group_size"], sym=scheme["symmetric"]),
        seqlen=windows.shape[1], seed=job["seed"], device_map=job["device"], **options,
    )  # fmt: skip
    _, folder = engine.quantize_and_save(str(out), format=f"auto_{packing(job)}")
    if Path(folder) != out:  # the engine makes a folder in the folder that it is given, named after the model
        for file in Path(folder).iterdir():
            file.replace(out / file.name)
        Path(folder).rmdir()
    # It computes in bfloat16, or float32 on a processor without, and leaves what it does not quantize so.
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(halves, shard, metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
