"""AutoAWQ's AWQ as one process: `python -I autoawq.py JOB_DIR`, job.json in, result.json out."""

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
    import awq  # noqa: F401 (imported here to be counted as an import)

    import_cpu_s = time.process_time()
    notes = quantize(job)
    result = {
        "engine": "autoawq", "version": version("autoawq"), "method": job["method"], "format": "awq",
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
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    from awq.quantize.quantizer import AwqQuantizer
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    class CpuQuantizer(AwqQuantizer):  # type: ignore[misc]
        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module: Any, *others: Any) -> Any:
            # It keeps what it puts back after each try by .cpu(): on a CPU, no copy but the weights that it multiplies.
            copies = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            module.state_dict = lambda: copies
            best_I = super()._compute_best_scale(x, w_mean, x_mean, module, *others)
            del module.state_dict
            return best_I

        def _compute_best_clip(self, weight_OI: Any, input_TI: Any) -> Any:
            # The same search, its sums over a group as matrix products: element by element it takes a minute a layer.
            input_TI = input_TI.flatten(0, -2)
            input_GiT = input_TI[:: max(1, len(input_TI) // 512)].unflatten(1, (-1, self.group_size)).permute(1, 2, 0)
            limits = []
            for rows_GOi in weight_OI.unflatten(1, (-1, self.group_size)).transpose(0, 1).split(256, dim=1):
                best = largest = rows_GOi.abs().amax(-1, keepdim=True)
                lowest, wanted = torch.full_like(largest, float("inf")), rows_GOi @ input_GiT
                for limit in (largest * (1 - step / 20) for step in range(10)):
                    tried = self.pseudo_quantize_tensor(rows_GOi.clamp(-limit, limit).flatten(0, 1))[0]
                    error = (tried.view_as(rows_GOi) @ input_GiT - wanted).square().mean(-1, keepdim=True)
                    best, lowest = torch.where(error < lowest, limit, best), torch.minimum(error, lowest)
                limits.append(best.transpose(0, 1))
            return torch.cat(limits)

    assert job["method"] == "awq", job["method"]
    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    scheme, source, out = job["scheme"], Path(job["checkpoint"]), Path(job["out"])
    if scheme["symmetric"]:
        raise ValueError("AutoAWQ's gemm files always have zero points: quantize with an asymmetric scheme")
    notes, dtype, quantizer = [], torch.float16, AwqQuantizer
    if job["device"] == "cpu":  # float32 is many times faster than float16 on most processors
        dtype, quantizer = torch.float32, CpuQuantizer
        notes = ["its search for scales, which spoils the weights on a CPU, works on copies of them",
                 "its search for clips, a minute a layer on a CPU, is computed with matrix products"]  # fmt: skip
    config = json.loads((source / "config.json").read_bytes())
    old = AutoConfig.for_model(**older_config(config) | {"use_cache": False})
    model = AutoModelForCausalLM.from_pretrained(source, config=old, torch_dtype=dtype).eval()
    engine = AWQ_CAUSAL_LM_MODEL_MAP[config["model_type"]](model, config["model_type"], False, old, None, None)
    settings = {"w_bit": scheme["bits"], "q_group_size": scheme["group_size"], "zero_point": True, "version": "GEMM"}
    windows = load_file(job["tokens"])["input_ids"]
    # It joins the samples and cuts them again at the longest length: with these two limits, into the same windows.
    sizes = {"max_calib_samples": windows.shape[0], "max_calib_seq_len": windows.shape[1]}
    engine.quantize(None, settings, windows.tolist(), quantizer_cls=quantizer, **sizes, **job["options"])

    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.half().state_dict().items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # The head is always left as it is, though the engine does not name it.
    stored = engine.quant_config.to_transformers_dict() | {"modules_to_not_convert": ["lm_head"]}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": stored}, indent=2))
    return notes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
