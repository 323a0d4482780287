"""What a candidate keeps of its reference's scores in lm-eval tasks, both answered by vLLM through their own kernels.

A task is the NAME of one in `eval/tasks/` or of lm-eval's own, the path of a task's YAML, or of a folder of them. A
child process asks lm-eval's vLLM backend; a file for each model and task says what came of it, so that a killed
evaluation goes on with the next task, and a reference is asked once for all its candidates.
"""

import difflib
import functools
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from quantkit import artifacts, processes, provenance, vllm_environment
from quantkit.errors import QuantkitError, raise_all
from quantkit.evaluate import gates
from quantkit.progress import LINE, Report

# Longer inputs are cut, and said to be: beyond it the cache of a large model takes more memory than its answers tell.
MAX_LENGTH = 4096
JOB_NAME = "job.json"
# datasets' own readers of files. Whatever else a task reads comes from the hub.
_FILE_READERS = ("json", "csv", "text", "parquet", "arrow")
# What a way to the hub needs of its surroundings: where its copies lie, who asks, and through which proxy.
_HUB = (
    "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
)  # fmt: skip


class Source(BaseModel):
    """Where a task comes from: a YAML, or lm-eval's own tasks (then its name may stand for a group of them)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    path: str | None
    digest: str  # of the YAML and the files that it reads; of the name, where lm-eval's version says the rest

    @property
    def from_hub(self) -> bool:
        """Whether its data lie on the Hugging Face hub."""
        return self.path is None or _read_task(Path(self.path)).get("dataset_path") not in _FILE_READERS


class Model(BaseModel):
    """A model that is asked, and for each task the name of the file for what came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    kv_cache: str
    files: list[str]


class Job(BaseModel):
    """What the child is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    models: list[Model]
    sources: list[Source]
    limit: int | None  # samples of each task, its first ones
    seed: int
    max_length: int  # tokens


class Measure(BaseModel):
    """One metric of one task, as one model did."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: str
    metric: str  # with the filter of the answers behind a comma, where there is one
    higher_is_better: bool
    value: float
    standard_error: float | None  # lm-eval's own
    # value is, of m = the sum of the samples' first numbers / the sum of their second: m, exp(-m) or -m / ln 2
    kind: Literal["mean", "perplexity", "bits", "other"]
    documents: list[str]  # a digest of each sample, to pair two models by
    values: list[tuple[float, float]]  # of each sample; empty for another kind


class Answers(BaseModel):
    """What came of one task with one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    measures: list[Measure]
    cut: int  # how often lm-eval said that it cut an input to max_length


def resolve(tasks: Sequence[str]) -> list[Source]:
    """Find tasks by name or path. Reads YAMLs alone: quick, and before any long work.

    Raises:
        QuantkitError: some are not to be found; all of them, and where those of one's own are.
    """
    problems: list[str] = []
    found: dict[str, Source] = {}
    for word in tasks:
        path, own = Path(word), own_tasks() / f"{word}.yaml"
        if path.is_dir() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            files = _yamls(path)
            if not files:
                problems.append(f"{word} holds no task: give the YAML of an lm-eval task, or a folder of such")
            sources = [_local(file) for file in files]
        elif own.is_file():
            sources = [_local(own)]
        elif word in _lm_eval_names():
            sources = [Source(name=word, path=None, digest=provenance.digest_of(word))]
        else:
            problems.append(_unknown(word))
            continue
        for source in sources:
            if found.setdefault(source.name, source) != source:
                problems.append(f"two tasks are named {source.name}: {found[source.name].path} and {source.path}")
    raise_all(problems)
    return list(found.values())


def own_tasks() -> Path:
    """The folder of the project's own tasks: inside the package when it is installed, `eval/tasks/` in a checkout."""
    return gates.folder() / "tasks"


def run(
    reference: Path, candidates: Mapping[str, Path], tasks: Sequence[str], *, folder: Path, limit: int | None,
    seed: int, report: Report, kv_caches: Mapping[str, str] | None = None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """The rows of each candidate, one a task and metric: scores, recovery and its standard error over samples.

    Recovery is candidate / reference, or its inverse where lower is better; None where that divides by zero.
    `folder` keeps what each model answered. kv_caches: vLLM's `kv_cache_dtype` of candidates by name, where it is not
    `auto`.

    Raises:
        QuantkitError: an unknown task, a task whose data are not to be had, or vLLM failed.
    """
    sources = resolve(tasks)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"limit": limit, "seed": seed, "max_length": _max_length([reference, *candidates.values()])}
    models = [_model(reference, "auto", sources, settings)]
    for name, path in candidates.items():
        models.append(_model(path, (kv_caches or {}).get(name, "auto"), sources, settings))
    job = Job.model_validate({"models": models, "sources": sources} | settings)
    if any(not (folder / file).exists() for model in models for file in model.files):
        _ask(job, folder, report)
    answers = [[Answers.model_validate_json((folder / file).read_bytes()) for file in model.files] for model in models]
    cut = sum(each.cut for of_model in answers for each in of_model)
    if cut:
        report(f"lm-eval cut {cut} inputs to {job.max_length} tokens: their scores are of what was left", 0, LINE)
    measures = [[measure for each in of_model for measure in each.measures] for of_model in answers]
    return {
        name: [_row(*pair) for pair in zip(measures[0], of_candidate, strict=True)]
        for name, of_candidate in zip(candidates, measures[1:], strict=True)
    }


class Recovery(NamedTuple):
    """What is kept of a score; 1 is all of it."""

    value: float | None
    standard_error: float | None


def recovery(reference: Measure, candidate: Measure) -> Recovery:
    """The ratio of two scores, greater is better, and its standard error.

    Both models answered the same samples, so what tells is how each sample moves the ratio R = X / Y: by the delta
    method its standard error is that of the mean of (x_s - R y_s) / Y, with x_s and y_s the samples' influences on
    the two scores. Where a score is no function of sums over samples (F1, BLEU), from the two scores' own standard
    errors, as if the models had answered different samples: it is then too large rather than too small.
    """
    assert (reference.task, reference.metric) == (candidate.task, candidate.metric)
    assert reference.documents == candidate.documents, f"{reference.task}: the models were asked different samples"
    top, bottom = (candidate, reference) if reference.higher_is_better else (reference, candidate)
    if bottom.value == 0 or not math.isfinite(top.value / bottom.value):
        return Recovery(None, None)
    ratio = top.value / bottom.value
    count = len(reference.values)
    if count > 1:
        moved_S = (_influences(top) - ratio * _influences(bottom)) / bottom.value
        return Recovery(ratio, float(moved_S.std(unbiased=True)) / math.sqrt(count))
    errors = (top.standard_error, bottom.standard_error)
    if count or errors[0] is None or errors[1] is None:
        return Recovery(ratio, None)
    return Recovery(ratio, math.hypot(errors[0], ratio * errors[1]) / abs(bottom.value))


def _influences(measure: Measure) -> Tensor:
    """How much each sample moves the score, times their number: float64 [S], of mean zero."""
    first_S, second_S = torch.tensor(measure.values, dtype=torch.float64).unbind(-1)
    mean = first_S.sum() / second_S.sum()
    slope = {"mean": 1.0, "perplexity": -measure.value, "bits": -1 / math.log(2)}[measure.kind]
    return slope * (first_S - mean * second_S) / second_S.mean()


def _row(reference: Measure, candidate: Measure) -> dict[str, Any]:
    kept = recovery(reference, candidate)
    return {
        "task": reference.task, "metric": reference.metric, "reference": reference.value, "candidate": candidate.value,
        "recovery": kept.value, "standard_error": kept.standard_error, "samples": len(reference.documents),
    }  # fmt: skip


def _ask(job: Job, folder: Path, report: Report) -> None:
    """Have a child process answer what has no file yet."""
    if vllm_environment.distribution() is None:
        raise QuantkitError(f"vLLM is not installed: {vllm_environment.INSTALL_HINT}")
    artifacts.write_text(folder / JOB_NAME, job.model_dump_json(indent=1))
    env = vllm_environment.process_environment(on_cpu=vllm_environment.is_cpu_build())
    env |= vllm_environment.one_process(on_cpu=vllm_environment.is_cpu_build())
    if any(source.from_hub for source in job.sources):
        del env["HF_HUB_OFFLINE"], env["TRANSFORMERS_OFFLINE"]
        env |= processes.passed_on(_HUB)
    else:
        env["HF_DATASETS_CACHE"] = str((folder / "datasets").resolve())
    files = [folder / file for model in job.models for file in dict.fromkeys(model.files)]

    def tick(seconds: float, line: str) -> None:
        report("lm-eval, task", sum(file.exists() for file in files), len(files))

    log = folder / "worker.log"
    command = [sys.executable, "-P", "-m", "quantkit.evaluate.tasks_worker", str(folder.resolve())]
    spent = processes.run_logged(command, env=env, folder=Path.cwd(), log=log, on_tick=tick)
    if spent.exit_code:
        line = processes.telling_line(log)
        refused = "quantkit.errors.QuantkitError: "
        if line.startswith(refused):
            raise QuantkitError(line.removeprefix(refused))
        raise QuantkitError(f"lm-eval on vLLM failed ({line}); the whole log is {log}")
    report("lm-eval, task", len(files), len(files))


def _model(path: Path, kv_cache: str, sources: Sequence[Source], settings: Mapping[str, Any]) -> Model:
    """A model, and the names of its files: other ones for whatever shapes what is in them."""
    versions = {
        name: version for name, version in provenance.versions().items() if name.startswith(("vllm", "lm-eval"))
    }
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(path.iterdir())]
    asked = {"model": [str(path.resolve()), kv_cache, stamps], "versions": versions, **settings}
    files = [
        f"{_spelt(source.name)}-{provenance.digest_of(asked | {'task': source.digest})[:16]}.json" for source in sources
    ]
    return Model(path=str(path.resolve()), kv_cache=kv_cache, files=files)


def _spelt(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^\w.-]", "_", name)


def _max_length(models: Sequence[Path]) -> int:
    configs = [json.loads((model / "config.json").read_bytes()) for model in models]
    return min(MAX_LENGTH, *(int(config.get("max_position_embeddings", MAX_LENGTH)) for config in configs))


def _yamls(path: Path) -> list[Path]:
    """The YAML itself, or those of a folder that name a task; others are included by them, or group them."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    return [file for file in sorted(path.glob("*.y*ml")) if isinstance(_read(file).get("task"), str)]


def _local(path: Path) -> Source:
    name = _read_task(path).get("task")
    if not isinstance(name, str):
        raise QuantkitError(f"{path} is not the YAML of a task: it names none by `task: NAME`")
    files = [path, *_data_files(path)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise QuantkitError(f"task {name}: {missing[0]} is not there; {path} reads it, relative to its own folder")
    digests = [provenance.file_digest(file) for file in files]
    return Source(name=name, path=str(path.resolve()), digest=provenance.digest_of([_read_task(path), digests]))


def _data_files(path: Path) -> list[Path]:
    """The files of this machine that a task reads."""
    settings = _read_task(path)
    named = (settings.get("dataset_kwargs") or {}).get("data_files") or []
    if settings.get("dataset_path") not in _FILE_READERS:
        return []
    parts = named.values() if isinstance(named, dict) else [named]
    words = [word for part in parts for word in ([part] if isinstance(part, str) else part)]
    return [path.parent / word for word in words if "://" not in word and "*" not in word]


def _read_task(path: Path) -> dict[str, Any]:
    """What a task's YAML says, with what it includes."""
    settings = _read(path)
    included: dict[str, Any] = {}
    includes = settings.pop("include", [])
    for other in [includes] if isinstance(includes, str) else includes:
        included |= _read_task(path.parent / other)
    return included | settings


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_bytes(), Loader=_Loader)
    except (OSError, yaml.YAMLError) as error:
        raise QuantkitError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    return settings if isinstance(settings, dict) else {}


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's `!function module.name` as text: the functions are the child's business."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {getattr(node, 'value', '')}")


@functools.cache
def _lm_eval_names() -> frozenset[str]:
    """Names of lm-eval's own tasks, groups and tags. Its index of them takes a minute to make; this takes seconds."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations is not None
    names: set[str] = set()
    for folder, _, files in os.walk(Path(spec.submodule_search_locations[0]) / "tasks"):
        for file in files:
            if file.endswith(".yaml"):
                text = Path(folder, file).read_text(encoding="utf-8", errors="replace")
                for named, listed in _NAMED.findall(text):
                    names |= {word.strip("\"'") for word in (named, *listed.replace("- ", " ").split()) if word}
    return frozenset(names)


# `task: NAME`, or `tag:` and a list of names below it
_NAMED = re.compile(
    r"^[\"']?(?:task|group|tag)[\"']?:(?:[ \t]+([^\s\[{#]+)[ \t]*$|[ \t]*((?:\n[ \t]*-[ \t]+[^\s:]+[ \t]*$)+))", re.M
)


def _unknown(word: str) -> str:
    own = sorted(path.stem for path in own_tasks().glob("*.yaml"))
    near = difflib.get_close_matches(word, [*own, *_lm_eval_names()], n=3)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    return (
        f"{word} is no task of lm-eval{meant}: give one of its names, one of {', '.join(own)} "
        f"(in {own_tasks()}), or the path of a task's YAML"
    )
