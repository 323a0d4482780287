"""The child of `quantkit.evaluate.tasks`: lm-eval's vLLM backend for each model, a file for each of its tasks."""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from quantkit import artifacts
from quantkit.errors import QuantkitError
from quantkit.evaluate.tasks import JOB_NAME, Answers, Job, Measure, Model, Source
from quantkit.offline import Engine
from quantkit.offline_worker import engine_settings


def main() -> None:
    """Answer the job in the folder that is named on the command line; what has a file already is left out."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(sys.argv[1])
    job = Job.model_validate_json((folder / JOB_NAME).read_bytes())
    # lm-eval's bootstrap would fork a process that holds vLLM, for each core
    os.environ["DISABLE_MULTIPROC"] = "1"
    cuts = _Cuts()
    logging.getLogger("lm_eval").addHandler(cuts)
    loaded = load(job.sources)  # before any engine: the data may not be to be had
    for model in job.models:
        missing = [number for number, file in enumerate(model.files) if not (folder / file).exists()]
        if missing:
            lm = _start(model, job)
            for number in missing:
                cuts.count = 0
                tasks, group = loaded[number]
                measures = measure(lm, tasks, limit=job.limit, seed=job.seed)
                measures = measures if group is None else pool(measures, group)
                answers = Answers(measures=measures, cut=cuts.count)
                artifacts.write_text(folder / model.files[number], answers.model_dump_json())
            _stop(lm)
            del lm


def load(sources: Iterable[Source]) -> list[tuple[list[Any], Any]]:
    """lm-eval's tasks of each source: one, or all of a group, with that group.

    Raises:
        QuantkitError: their data are not to be had, or they would run code that a model wrote.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=any(source.path is None for source in sources))
    loaded = []
    for source in sources:
        # a task's YAML names its data relative to itself, lm-eval reads them relative to where it runs
        where = contextlib.chdir(Path(source.path).parent) if source.path else contextlib.nullcontext()
        try:
            with where:
                found = manager.load([source.path or source.name])
        except (OSError, httpx.HTTPError) as error:
            if not source.from_hub:
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise QuantkitError(
                f"task {source.name}: its data could not be fetched from the Hugging Face hub ({said}): run it once "
                "where the hub can be reached, with the same HF_HOME, or choose a task that reads files of this machine"
            ) from error
        tasks = list(found["tasks"].values())
        if any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
            raise QuantkitError(f"task {source.name} runs code that the model writes: quantkit does not; leave it out")
        loaded.append((tasks, found["groups"].get(source.name)))
    return loaded


def measure(lm: Any, tasks: list[Any], *, limit: int | None, seed: int) -> list[Measure]:
    """Every metric of the tasks, as lm-eval scores the model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=lm, tasks=tasks, task_manager=TaskManager(include_defaults=False), limit=limit, bootstrap_iters=1000,
        log_samples=True,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    return [
        _measure(task, key, found["results"][task.task_name], found["samples"][task.task_name])
        for task in tasks
        for key, value in found["results"][task.task_name].items()
        if isinstance(value, int | float) and "," in key and "_stderr," not in key
    ]


def pool(measures: list[Measure], group: Any) -> list[Measure]:
    """One measure over all samples for each metric that the group is scored by; its tasks' own where it is by none.

    That is lm-eval's score of the group where the tasks weigh as many samples as they have. Where they weigh alike, the
    group's score has no error that is paired by sample, and the tasks stay apart.
    """
    scored_by = group.aggregate_metric_list or []
    if not scored_by or any(not each.weight_by_size or each.aggregation != "mean" for each in scored_by):
        return measures
    pooled = []
    for metric in dict.fromkeys(measure.metric for measure in measures):
        parts = [measure for measure in measures if measure.metric == metric and measure.kind == "mean"]
        name, _, filter_name = metric.partition(",")
        if parts and any(
            each.metric == name and (each.filter_list is None or (filter_name or "none") in each.filter_list)
            for each in scored_by
        ):
            values = [value for part in parts for value in part.values]
            documents = [document for part in parts for document in part.documents]
            mean = sum(first for first, _ in values) / sum(second for _, second in values)
            whole = {"task": group.name, "value": mean, "standard_error": None, "documents": documents}
            pooled.append(parts[0].model_copy(update=whole | {"values": values}))
    return pooled


def _measure(task: Any, key: str, scores: dict[str, Any], samples: list[dict[str, Any]]) -> Measure:
    """One metric: its score, and what each sample gives to it."""
    from lm_eval.api import metrics

    metric, filter_name = key.split(",", 1)
    kinds: dict[Any, Any] = {
        metrics.mean: "mean", metrics.perplexity: "perplexity", metrics.weighted_perplexity: "perplexity",
        metrics.bits_per_byte: "bits",
    }  # fmt: skip
    # lm-eval takes the mean of a metric that says nothing of how it is summed up
    kind = kinds.get(task.aggregation().get(metric, metrics.mean), "other")
    scored = sorted(
        (sample for sample in samples if sample["filter"] == filter_name and metric in sample),
        key=lambda sample: sample["doc_id"],
    )
    error = scores[f"{metric}_stderr,{filter_name}"]
    return Measure(
        task=task.task_name,
        metric=metric if filter_name == "none" else key,
        higher_is_better=task.higher_is_better().get(metric, True),
        value=float(scores[key]),
        standard_error=float(error) if isinstance(error, int | float) else None,
        kind=kind,
        documents=[sample["doc_hash"] for sample in scored],
        values=[_parts(sample[metric]) for sample in scored] if kind != "other" else [],
    )


def _parts(value: Any) -> tuple[float, float]:
    """A sample's number and its weight, such as the log-probability of a text and its words."""
    return (float(value[0]), float(value[1])) if isinstance(value, tuple | list) else (float(value), 1.0)


def _start(model: Model, job: Job) -> Any:
    """lm-eval's model on a vLLM engine, told what every engine of quantkit is told."""
    from lm_eval.models.vllm_causallms import VLLM

    settings = engine_settings(
        Engine(model=model.path, max_model_len=job.max_length, kv_cache_dtype=model.kv_cache, seed=job.seed)
    )
    # answers are judged as text
    return VLLM(pretrained=model.path, batch_size="auto", **settings | {"skip_tokenizer_init": False})


def _stop(lm: Any) -> None:
    """Give back what the engine holds, for the next one."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    del lm.model
    gc.collect()
    cleanup_dist_env_and_memory()


class _Cuts(logging.Handler):
    """Counts what lm-eval says of inputs that it cut."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "runcat" in record.getMessage()


def _end_with_parent() -> None:
    """End this process and those that it started when whoever asked is gone: standard input ends with it."""
    os.read(0, 1)
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
