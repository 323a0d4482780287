"""speculators' EAGLE-3 training as one process: `python -I speculators.py JOB_DIR`, job.json in, result.json out."""

import json
import os
import signal
import stat
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

# By what its trainer passes to the model, and its command line's defaults; `options` may say otherwise.
DEFAULTS: dict[str, Any] = {
    "loss_fn": "kl_div", "ttt_step_loss_decay": 1.0, "optimizer": "muon",
    "weight_decay": 0.01, "norm_before_residual": True, "norm_before_fc": True, "norm_output": True,
}  # fmt: skip


def main(folder: Path) -> None:
    """Run the job in `folder`; result.json appears only when the head is whole."""
    threading.Thread(target=end_with_host, daemon=True).start()
    job = json.loads((folder / "job.json").read_bytes())
    # On CUDA the engine compiles its model anew for each length of a batch; attention and losses are plain torch here.
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"]), "TORCH_COMPILE_DISABLE": "1"}
    import speculators.models.eagle3
    import speculators.train.cli  # noqa: F401 (imported here to be counted as an import)

    import_cpu_s = time.process_time()
    steps, losses, agreement = train(job)
    result = {
        "engine": "speculators", "version": version("speculators"), "method": job["method"],
        "import_cpu_s": import_cpu_s, "notes": ["its Trainer wants an accelerator: its loop is the worker's own"],
        "steps": steps, "epoch_losses": losses, "first_token_agreement": agreement,
    }  # fmt: skip
    temporary = folder / ".result.json.tmp"
    temporary.write_text(json.dumps(result, indent=2))
    temporary.replace(folder / "result.json")


def end_with_host() -> None:
    """Standard input is a pipe that ends with whoever waits for the result: without them nothing is left to do."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)


def train(job: dict[str, Any]) -> tuple[int, list[float], float]:
    """Write the trained head; returns steps, mean loss of each epoch, and agreement at the first draft position."""
    import torch
    from speculators.models.eagle3 import shift_batch
    from speculators.train.data import CollateFn
    from speculators.train.optimizers import build_optimizers
    from speculators.train.trainer import TrainerConfig
    from transformers import get_linear_schedule_with_warmup, set_seed

    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    settings = DEFAULTS | job["options"]
    exchanges = [json.loads(line) for line in Path(job["exchanges"]).read_text().splitlines()]
    samples, layers = read_target(job, exchanges), job["layers"]
    head = new_head(job, settings, exchanges).to(job["device"])
    call, _ = head.get_trainer_kwargs(
        ttt_steps=job["speculative_tokens"], ttt_step_loss_decay=settings["ttt_step_loss_decay"],
        loss_fn=settings["loss_fn"], loss_implementation="eager",  # the other one is Triton's
    )  # fmt: skip
    rate, size = job["learning_rate"], job["batch_size"]
    optimizers = build_optimizers(head, TrainerConfig(
        lr=rate, muon_lr=rate, num_epochs=job["epochs"], save_path="", optimizer=settings["optimizer"],
        weight_decay=settings["weight_decay"],
    ))  # fmt: skip
    steps = -(-len(samples) // size) * job["epochs"]
    schedules = [get_linear_schedule_with_warmup(each, round(job["warmup"] * steps), steps) for each in optimizers]
    step, epoch_losses = 0, []
    for epoch in range(job["epochs"]):
        order, summed, counted, right = torch.randperm(len(samples)).tolist(), 0.0, 0, 0.0
        for begin in range(0, len(order), size):
            chosen = [dict(samples[index]) for index in order[begin : begin + size]]
            length = sum(len(sample["input_ids"]) - 1 for sample in chosen)
            collate = CollateFn(length, head.hidden_size, len(layers), dtype=head.dtype, preprocess=shift_batch)
            batch = {name: part.to(job["device"]) for name, part in collate(chosen).items() if name != "error_records"}
            with torch.autocast(job["device"], torch.bfloat16, enabled=job["device"] != "cpu"):
                _, loss, seen = head(**batch, **call)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            for each in (*optimizers, *schedules):
                each.step()
            head.zero_grad()
            answered = int(batch["loss_mask"].sum())
            summed, counted = summed + loss.item() / job["speculative_tokens"] * answered, counted + answered
            right += float(seen["full_acc_0_sum"])
            step += 1
            print(f"training, epoch {epoch + 1}, loss {summed / counted:.3f}, step {step} of {steps}", flush=True)
        epoch_losses.append(summed / counted)
    # vLLM shares the target's embeddings with a head that has none of its own.
    weights = {name: part for name, part in head.to(torch.float16).state_dict().items() if "embed_tokens" not in name}
    head.config.speculators_config.verifier.name_or_path = None  # a path of this machine
    head.save_pretrained(job["out"], state_dict=weights)
    return steps, epoch_losses, right / counted


def read_target(job: dict[str, Any], exchanges: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The target's states over each exchange, bfloat16 as the engine keeps them."""
    import torch
    from transformers import AutoModelForCausalLM

    on_cpu = job["device"] == "cpu"
    target = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32 if on_cpu else torch.bfloat16)
    decoder = target.model.to(job["device"])
    decoder.norm = torch.nn.Identity()  # the engine has the last norm in its head
    samples = []
    for exchange in exchanges:
        ids = torch.tensor(exchange["prompt"] + exchange["answer"])
        with torch.no_grad():
            found = decoder(ids[None].to(job["device"]), output_hidden_states=True, use_cache=False)
        hidden = torch.cat([found.hidden_states[layer][0] for layer in job["layers"]], -1)
        samples.append({
            "input_ids": ids, "position_ids": torch.arange(len(ids)), "lengths": torch.tensor([len(ids)]),
            "loss_mask": torch.arange(len(ids)) >= len(exchange["prompt"]),
            "hidden_states": hidden.bfloat16().cpu(),
            "verifier_last_hidden_states": found.last_hidden_state[0].bfloat16().cpu(),
        })  # fmt: skip
        print(f"the target reads its answers, {len(samples)} of {len(exchanges)}", flush=True)
    return samples


def new_head(job: dict[str, Any], settings: dict[str, Any], exchanges: list[dict[str, Any]]) -> Any:
    """A head of one Llama layer, over the tokens that the answers hold most often."""
    import torch
    from speculators.models.eagle3 import Eagle3DraftModel
    from speculators.train.cli import create_transformer_layer_config
    from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution

    config = create_transformer_layer_config(
        job["checkpoint"], num_layers=1, draft_arch="llama", hidden_act=None, sliding_window=0,
        full_attention_indices=[0],
    )  # fmt: skip
    vocabulary = min(job["draft_vocab_size"], config.vocab_size)
    counts = Counter(token for exchange in exchanges for token in exchange["answer"])
    d2t, t2d = build_vocab_mappings_from_distribution(counts, vocabulary, config.vocab_size)
    head = Eagle3DraftModel.from_training_args(
        config, t2d=t2d, d2t=d2t, draft_vocab_size=vocabulary, verifier_name_or_path=job["checkpoint"],
        target_layer_ids=job["layers"], ttt_steps=job["speculative_tokens"],
        # flex attention has no backward pass on a CPU
        draft_attn_impl="sdpa",
        **{name: settings[name] for name in ("norm_before_residual", "norm_before_fc", "norm_output")},
    )  # fmt: skip
    return head.float().to(torch.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
