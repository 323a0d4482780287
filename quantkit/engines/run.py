"""One engine from what it learns from to a checkpoint, or a head, that was checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint import Checkpoint, save_tensors
from quantkit.engines import contract, environment, head, registry, verify
from quantkit.engines.contract import AnyJob, Finished, ResultT
from quantkit.errors import QuantkitError
from quantkit.formats import Storage
from quantkit.progress import LINE, Report
from quantkit.recipe import Draft


def quantize(
    name: str, source: Checkpoint, input_ids_ST: Tensor, *, method: str | None, stored: Storage,
    options: Mapping[str, bool | int | float | str], seed: int, device: str, out: Path, folder: Path, report: Report,
) -> dict[str, Any]:  # fmt: skip
    """Have the engine write a checkpoint, check it, and move it to `out`; returns what the manifest says of it.

    `folder` is on the same disk as `out`; job, log and result stay there until the caller removes it.

    Raises:
        QuantkitError: no environment, a failed worker, or a checkpoint other than what was asked.
    """
    job_folder = (folder / name).resolve()
    made, tokens = job_folder / "made", (folder / "tokens.safetensors").resolve()
    save_tensors(tokens, {"input_ids": input_ids_ST})
    job = contract.Job(
        checkpoint=str(source.path.resolve()), tokens=str(tokens), method=method or registry.default_method(name),
        scheme=contract.Scheme(bits=stored.bits, group_size=stored.group_size, symmetric=stored.symmetric),
        options=dict(options), seed=seed, device=device, threads=contract.threads(), out=str(made),
    )  # fmt: skip
    ran = _run(name, job, job_folder, contract.Result, report)
    verify.take_over(made, out, source=source, wanted=stored, name=name, report=report)
    return _record(name, job, ran, report)


def train_head(
    name: str, target: Checkpoint, exchanges: Path, settings: Draft, *, seed: int, device: str, out: Path, folder: Path,
    report: Report,
) -> dict[str, Any]:  # fmt: skip
    """Have the engine train an EAGLE-3 head for a dense target, check it, and move it to `out`.

    exchanges: what `conversations.save_exchanges` wrote. Returns what the manifest says of it.

    Raises:
        QuantkitError: no environment, a failed worker, or something other than a head of this target.
    """
    job_folder = (folder / name).resolve()
    layers = head.layers_read(target.arch.num_layers)
    job = contract.HeadJob(
        checkpoint=str(target.path.resolve()), exchanges=str(exchanges.resolve()), method=settings.kind, seed=seed,
        device=device, threads=contract.threads(), out=str(job_folder / "made"), layers=layers, epochs=settings.epochs,
        batch_size=settings.batch_size, learning_rate=settings.learning_rate, warmup=settings.warmup,
        speculative_tokens=settings.speculative_tokens, draft_vocab_size=settings.draft_vocab_size,
    )  # fmt: skip
    ran = _run(name, job, job_folder, contract.HeadResult, report)
    head.take_over(job_folder / "made", out, target=target, layers=layers, name=name)
    result = ran.result
    return {
        "engine": _record(name, job, ran, report), "reads_behind_layers": layers, "steps": result.steps,
        "epoch_losses": [round(loss, 4) for loss in result.epoch_losses],
        "first_token_agreement_in_training": round(result.first_token_agreement, 4),
    }  # fmt: skip


def _run(name: str, job: AnyJob, folder: Path, returns: type[ResultT], report: Report) -> Finished[ResultT]:
    """The job through the engine's worker in its environment, made first where it is not there."""
    environment.ensure(name, report)
    ran = contract.run(
        name, job, folder, returns=returns, python=environment.python(name), worker=registry.worker(name), report=report
    )
    if ran.result.version != registry.EVERY[name].version:
        raise QuantkitError(
            f"engine {name} ran {ran.result.version}, its pins say {registry.EVERY[name].version}: remove "
            f"{environment.folder(name)} and run again"
        )
    return ran


def _record(name: str, job: AnyJob, ran: Finished[ResultT], report: Report) -> dict[str, Any]:
    """What the manifest says of the engine; its notes are told too."""
    result, spent = ran
    for note in result.notes:
        report(f"{name}: {note}", 0, LINE)
    return {
        "name": name, "version": result.version, "method": result.method, "options": dict(job.options),
        "wall_s": round(spent.wall_s, 3), "cpu_s": round(spent.cpu_s, 3),
        "import_cpu_s": round(result.import_cpu_s, 3), "peak_memory_bytes": spent.peak_memory_bytes,
        "threads": job.threads, "notes": result.notes,
    }  # fmt: skip
