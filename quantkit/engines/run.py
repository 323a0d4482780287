"""One engine from calibration tokens to a checkpoint that was checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint import Checkpoint, save_tensors
from quantkit.engines import contract, environment, registry, verify
from quantkit.errors import QuantkitError
from quantkit.formats import Storage
from quantkit.progress import LINE, Report


def quantize(
    name: str, source: Checkpoint, input_ids_ST: Tensor, *, method: str | None, stored: Storage,
    options: Mapping[str, bool | int | float | str], seed: int, device: str, out: Path, folder: Path, report: Report,
) -> dict[str, Any]:  # fmt: skip
    """Have the engine write a checkpoint, check it, and move it to `out`; returns what the manifest says of it.

    `folder` is on the same disk as `out`; job, log and result stay there until the caller removes it.

    Raises:
        QuantkitError: no environment, a failed worker, or a checkpoint other than what was asked.
    """
    environment.ensure(name, report)
    job_folder = (folder / name).resolve()
    made, tokens = job_folder / "made", (folder / "tokens.safetensors").resolve()
    save_tensors(tokens, {"input_ids": input_ids_ST})
    job = contract.Job(
        checkpoint=str(source.path.resolve()), tokens=str(tokens), method=method or registry.default_method(name),
        scheme=contract.Scheme(bits=stored.bits, group_size=stored.group_size, symmetric=stored.symmetric),
        options=dict(options), seed=seed, device=device, threads=contract.threads(), out=str(made),
    )  # fmt: skip
    result, spent = contract.run(
        name, job, job_folder, python=environment.python(name), worker=registry.worker(name), report=report
    )
    if result.version != registry.ENGINES[name].version:
        raise QuantkitError(
            f"engine {name} ran {result.version}, its pins say {registry.ENGINES[name].version}: remove "
            f"{environment.folder(name)} and run again"
        )
    verify.take_over(made, out, source=source, wanted=stored, name=name, report=report)
    for note in result.notes:
        report(f"{name}: {note}", 0, LINE)
    return {
        "name": name, "version": result.version, "method": result.method, "options": dict(options),
        "wall_s": round(spent.wall_s, 3), "cpu_s": round(spent.cpu_s, 3),
        "import_cpu_s": round(result.import_cpu_s, 3), "peak_memory_bytes": spent.peak_memory_bytes,
        "threads": job.threads, "notes": result.notes,
    }  # fmt: skip
