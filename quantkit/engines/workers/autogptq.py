"""AutoGPTQ's GPTQ as one process: `python -I autogptq.py JOB_DIR`, job.json in, result.json out."""

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
    import auto_gptq  # noqa: F401 (imported here to be counted as an import)

    import_cpu_s = time.process_time()
    notes = quantize(job)
    result = {
        "engine": "autogptq", "version": version("auto-gptq"), "method": job["method"], "format": "gptq",
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


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 reads of a config.json of transformers 5; without it every rope_theta would be 10000."""
    rope = config.get("rope_parameters")
    if rope is None:
        return config
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    return config | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def quantize(job: dict[str, Any]) -> list[str]:
    """Write the quantized checkpoint; returns what was patched."""
    import torch
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    assert job["method"] == "gptq", job["method"]
    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    scheme, source, out = job["scheme"], Path(job["checkpoint"]), Path(job["out"])
    notes, dtype = ["it loads a model only where there is CUDA: loaded by transformers instead"], torch.float16
    if job["device"] == "cpu":
        # It moves each layer to a constant device and waits for it, also where there is no such device.
        _base.CUDA_0 = torch.device("cpu")
        torch.cuda.synchronize = lambda device=None: None
        notes.append("ran on the CPU: its device constant is replaced, and its wait for the GPU left out")
        dtype = torch.float32  # many times faster than float16 on most processors

    config = json.loads((source / "config.json").read_bytes())
    old = AutoConfig.for_model(**older_config(config))
    model = AutoModelForCausalLM.from_pretrained(source, config=old, torch_dtype=dtype).to(job["device"])
    biases = {name for name in model.state_dict() if name.endswith(".bias")}
    # Act order is off unless asked for: vLLM refuses groups out of order.
    options = {"desc_act": False} | job["options"]
    settings = BaseQuantizeConfig(scheme["bits"], scheme["group_size"], sym=scheme["symmetric"], **options)
    engine = GPTQ_CAUSAL_LM_MODEL_MAP[config["model_type"]](model, False, settings)
    pack_model = _base.pack_model

    def checked_pack_model(**arguments: Any) -> None:
        # It stores zero_point - 1, and of a zero point 0 the borrow would spoil the neighbours in the same int32.
        if any(bool((zero_point <= 0).any()) for _, _, zero_point, _ in arguments["quantizers"].values()):
            raise ValueError("a zero point is 0, which AutoGPTQ can not store: quantize with a symmetric scheme")
        pack_model(**arguments)

    _base.pack_model = checked_pack_model
    windows = load_file(job["tokens"])["input_ids"]
    engine.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows], batch_size=1)

    # Its own way to save adds a bias of zeros to every linear and a second copy of a tied head, and writes the config
    # as transformers 4 does.
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    tensors = {
        name: tensor.cpu().contiguous()
        for name, tensor in model.half().state_dict().items()
        if name not in tied and (name in biases or not name.endswith(".bias"))
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # with static groups, act order leaves every input in the group of its place
    stored = {key: value for key, value in settings.to_dict().items() if not key.startswith("model_")}
    stored |= {"checkpoint_format": "gptq", "desc_act": settings.desc_act and not settings.static_groups}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": stored}, indent=2))
    return notes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
