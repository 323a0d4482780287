"""The child of `quantkit.offline`: an engine for each job, a JSON line for each result, or the seconds of its steps."""

import atexit
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from quantkit import artifacts, hardware, processes, provenance, vllm_environment
from quantkit.kv_scheme import has_kv_scheme
from quantkit.offline import (
    RESULTS_NAME,
    SECONDS_NAME,
    TIMING_NAME,
    Engine,
    Job,
    Request,
    Result,
    Seconds,
    Speculation,
    Timing,
)


def main() -> None:
    """Run the jobs and timings whose folders come on standard input."""
    processes.answer(lambda folder: (time_steps if (folder / TIMING_NAME).exists() else run)(folder))


def run(folder: Path) -> None:
    """Run the job in `folder`; requests that already have a result are left out."""
    from vllm import SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    job, missing = read_job(folder)
    llm = _start(job)
    engine = llm.llm_engine
    for request in missing:
        sampling = SamplingParams(**sampling_settings(request))
        engine.add_request(request.name, {"prompt_token_ids": request.prompt}, sampling)
    before = _counters(llm.get_metrics())
    with (folder / RESULTS_NAME).open("a", buffering=1) as stream:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    stream.write(_result(output).model_dump_json() + "\n")
    if job.draft is not None:
        speculation = _speculation(before, _counters(llm.get_metrics()))
        artifacts.write_text(folder / "speculation.json", speculation.model_dump_json())
    del llm, engine
    cleanup_dist_env_and_memory()


def read_job(folder: Path) -> tuple[Job, list[Request]]:
    """The job in `folder`, and its requests that have no result there."""
    job = Job.model_validate_json((folder / "job.json").read_bytes())
    results_path = folder / RESULTS_NAME
    lines = results_path.read_text().splitlines() if results_path.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    return job, [request for request in job.requests if request.name not in done]


def time_steps(folder: Path) -> None:
    """Time the decode steps that `folder` asks for."""
    from vllm import SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    timing = Timing.model_validate_json((folder / TIMING_NAME).read_bytes())
    llm = _start(timing)
    engine = llm.llm_engine
    # On a CPU, where the engine runs in this thread, the seconds that it computes (barriers are slept through): on a
    # busy machine the wall clock tells many times that, and other times of the next engine. On a GPU only it knows.
    clock = time.thread_time if vllm_environment.is_cpu_build() else time.perf_counter
    found: list[list[float]] = []
    for number, size in enumerate(timing.batches):
        names = [f"{number}-{place}" for place in range(size)]
        for name, prompt in zip(names, timing.prompts, strict=False):
            room = timing.max_model_len - len(prompt)
            sampling = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True, detokenize=False)
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        begun: set[str] = set()
        steps_s: list[float] = []
        last_s = clock()
        while len(steps_s) < timing.steps:
            decoding = len(begun) == size
            outputs = engine.step()
            # from one return to the next: an engine in another process works while this one does not wait for it
            now_s = clock()
            if decoding:
                steps_s.append(now_s - last_s)
            last_s = now_s
            begun |= {output.request_id for output in outputs}
            assert not any(output.finished for output in outputs), "max_model_len leaves no room for the steps"
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        found.append(steps_s)
    artifacts.write_text(folder / SECONDS_NAME, Seconds(machine=_machine(), steps=found).model_dump_json())
    del llm, engine
    cleanup_dist_env_and_memory()


def _machine() -> str:
    """What the engine runs on, in words."""
    if vllm_environment.is_cpu_build():
        threads = int(os.environ["OMP_NUM_THREADS"])
        return f"{provenance.machine()['processor']}, {threads} thread{'s' if threads > 1 else ''}"
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name())


def _start(engine: Engine) -> Any:
    """vLLM's `LLM`."""
    from vllm import LLM

    settings = engine_settings(engine)
    if engine.draft is not None:
        settings["speculative_config"] = {
            "method": engine.speculative_method, "model": _draft(engine.model, engine.draft),
            "num_speculative_tokens": engine.speculative_tokens,
        }  # fmt: skip
    return LLM(model=engine.model, disable_log_stats=False, **settings)


def engine_settings(engine: Engine) -> dict[str, Any]:
    """How vLLM is told to be, its model and its draft apart."""
    settings: dict[str, Any] = {}
    dtype: str = engine.dtype
    on_cpu = vllm_environment.is_cpu_build()
    if on_cpu:
        # float16, which a float16 checkpoint would keep, has no fast kernel on most processors
        dtype = _fast_dtype(Path(engine.model)) if dtype == "auto" else dtype
        # Whole prompts: after half a one vLLM 0.32 rewinds the request's random generator, which a CPU's cannot
        # ("CPU Generator does not use offset").
        settings = {
            "kv_cache_memory_bytes": engine.kv_cache_bytes, "block_size": 32, "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, engine.max_model_len),
        }  # fmt: skip
    return settings | {
        "max_model_len": engine.max_model_len, "max_num_seqs": engine.max_num_seqs, "dtype": dtype,
        "kv_cache_dtype": _kept(engine), "seed": engine.seed, "load_format": "safetensors",
        "enforce_eager": on_cpu, "skip_tokenizer_init": True,
    }  # fmt: skip


def _kept(engine: Engine) -> str:
    """The cache's type: without AVX-512 vLLM's CPU build has none of FP8, which `auto` becomes where scales are.

    It must be the model's own then, which is bfloat16 with 4-bit weights: with another one attention reads noise.
    """
    alone = vllm_environment.is_cpu_build() and hardware.lacks_avx512()
    return (
        "bfloat16" if engine.kv_cache_dtype == "auto" and alone and _has_scheme(engine.model) else engine.kv_cache_dtype
    )


def _draft(model: str, draft: str) -> str:
    """The draft's folder; one without its KV scales where the target brings none: both share a type of cache."""
    if not _has_scheme(draft) or _has_scheme(model):
        return draft
    plain = Path(tempfile.mkdtemp(prefix="quantkit-draft-"))
    atexit.register(shutil.rmtree, plain, ignore_errors=True)
    for path in Path(draft).iterdir():
        if path.is_file() and path.name != "config.json":
            (plain / path.name).symlink_to(path.resolve())
    config = json.loads((Path(draft) / "config.json").read_bytes())
    config["quantization_config"]["kv_cache_scheme"] = None
    artifacts.write_json(plain / "config.json", config)
    return str(plain)


def _has_scheme(model: str) -> bool:
    return has_kv_scheme(json.loads((Path(model) / "config.json").read_bytes()))


def _fast_dtype(model: Path) -> str:
    """4-bit linears know 16-bit activations only; anything else runs in what the processor multiplies fast."""
    quantized = "quantization_config" in json.loads((model / "config.json").read_bytes())
    return "bfloat16" if quantized else str(hardware.compute_dtype("cpu")).removeprefix("torch.")


def sampling_settings(request: Request) -> dict[str, Any]:
    """What vLLM's SamplingParams are made of for a request."""
    return {
        "temperature": request.temperature, "max_tokens": request.max_tokens, "seed": request.seed,
        "detokenize": False, "stop_token_ids": request.stop_token_ids,
        "prompt_logprobs": 0 if request.prompt_logprobs else None,
    }  # fmt: skip


def _result(output: object) -> Result:
    completion = output.outputs[0]  # type: ignore[attr-defined]
    scored = output.prompt_logprobs  # type: ignore[attr-defined]
    prompt = output.prompt_token_ids  # type: ignore[attr-defined]
    logprobs = None
    if scored is not None:  # the first token has none; of each other one, its own entry is wanted
        logprobs = [entry[token].logprob for entry, token in zip(scored[1:], prompt[1:], strict=True)]
    return Result(
        name=output.request_id,  # type: ignore[attr-defined]
        tokens=list(completion.token_ids),
        finished="stop" if completion.finish_reason == "stop" else "length",
        prompt_logprobs=logprobs,
    )


def _counters(metrics: list[Any]) -> dict[str, Any]:
    """vLLM's counters of speculation. They belong to the process and go on counting from engine to engine."""
    start = "vllm:spec_decode_"
    return {
        metric.name.removeprefix(start): metric.values if hasattr(metric, "values") else metric.value
        for metric in metrics
        if metric.name.startswith(start)
    }


def _speculation(before: dict[str, Any], after: dict[str, Any]) -> Speculation:
    def grown(name: str) -> int:
        return int(after.get(name, 0) - before.get(name, 0))

    per_position = after.get("num_accepted_tokens_per_pos", [])
    earlier = before.get("num_accepted_tokens_per_pos", [0] * len(per_position))
    return Speculation(
        drafts=grown("num_drafts"),
        proposed=grown("num_draft_tokens"),
        accepted=grown("num_accepted_tokens"),
        accepted_per_position=[int(now - then) for now, then in zip(per_position, earlier, strict=True)],
    )


if __name__ == "__main__":
    main()
