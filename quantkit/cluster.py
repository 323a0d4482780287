"""The other child of `quantkit.offline`: the driver of a Ray cluster, on whose machines vLLM answers a job's requests.

Ray Data starts an engine for each GPU (of a CPU build: for each machine) and hands requests to whichever has room. Like
`quantkit.offline_worker` this process writes a JSON line for each result, so that a killed job goes on with the rest.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import offline_worker, processes, vllm_environment
from quantkit.errors import QuantkitError
from quantkit.offline import RESULTS_NAME, Request, Result

# Requests in a Ray task: they are finished, and written, when the longest of them is. Alone in its task each would cost
# more than a short answer does.
_BATCH = 8
_LOOK_EVERY_S = 2  # at the machines of the cluster


class Engines(NamedTuple):
    """How many engines a cluster has room for, and what each takes of a machine."""

    number: int
    takes: dict[str, int]  # by Ray's names: CPU or GPU


def main() -> None:
    """Run the jobs whose folders come on standard input on the cluster whose address is the argument."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    processes.answer(lambda folder: run(folder, sys.argv[1]))


def run(folder: Path, address: str) -> None:
    """Run the job in `folder` on a cluster; requests that already have a result are left out.

    Raises:
        QuantkitError: no cluster there, one without room for an engine, or machines that lack the checkpoint or differ
            in their vLLM.
    """
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    job, missing = offline_worker.read_job(folder)
    model = str(Path(job.model).resolve())  # Ray's processes work in folders of their own
    _join(address)
    try:
        _check_machines(model)
        engines = _engines(len(missing))
        settings = offline_worker.engine_settings(job)
        # Rows are brought to an engine and back without a processor of their own, as engines may hold all of them; and
        # by two processes, where Ray would start one for every row at once.
        beside = {"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=2)}
        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=model, engine_kwargs=settings, concurrency=(engines.number, engines.number),
                placement_group_config={"bundles": [engines.takes]}, batch_size=_BATCH,
                max_concurrent_batches=-(-job.max_num_seqs // _BATCH), log_engine_metrics=False,
                chat_template_stage=False, tokenize_stage=False, detokenize_stage=False,
            ),
            postprocess=lambda row: {"name": row["name"], "tokens": row["generated_tokens"]},
            preprocess_map_kwargs=beside, postprocess_map_kwargs=beside,
        )  # fmt: skip
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items([_row(each) for each in missing], override_num_blocks=-(-len(missing) // _BATCH))
        asked, ends = {request.name: request for request in missing}, _own_stop_tokens(model)
        with _watched(engines), (folder / RESULTS_NAME).open("a", buffering=1) as stream:
            for row in processor(dataset).iter_rows():
                request = asked.pop(row["name"], None)
                if request is not None:  # of an engine that died Ray asks again what it had in hand
                    stream.write(_result(request, row["tokens"], ends).model_dump_json() + "\n")
    finally:
        ray.shutdown()  # its engines end with the driver that they are for


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # not by an exception: the main thread may be waiting for the cluster


def _join(address: str) -> None:
    """Become the driver of a cluster that is there."""
    import ray

    on_cpu = vllm_environment.is_cpu_build()
    variables = vllm_environment.settings(on_cpu=on_cpu)
    if on_cpu:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # as many threads as Ray gives cores to the engine
    environment: dict[str, Any] = {"env_vars": variables}
    metadata = vllm_environment.metadata()
    if metadata is not None:
        environment["py_modules"] = [str(each) for each in metadata.iterdir()]  # Ray brings it to every machine
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself would knock for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, runtime_env=environment, logging_level="warning")
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        raise QuantkitError(
            f"no Ray cluster could be joined at {address!r} ({reason}): run this on one of its machines, with the "
            "address that `ray start --head` printed"
        ) from error


def _check_machines(model: str) -> None:
    """Ask every machine that may get an engine for what it needs, all that is missing at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = vllm_environment.distribution()
    assert found is not None
    name, version = found

    @ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
    def look() -> list[str]:  # goes by value: it may use nothing of this module
        import importlib.metadata
        import pathlib

        problems = []
        if not (pathlib.Path(model) / "config.json").is_file():
            problems.append(f"{model} is not there: put it, or --out, on a file system that every machine shares")
        there = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}.get(name)
        if there != version:
            problems.append(f"{name} {version} of this machine is {there or 'missing'} there: install the same")
        return problems

    machines = {node["NodeManagerAddress"]: node["NodeID"] for node in _machines()}
    said = ray.get(
        [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in machines.values()
        ]
    )
    problems = [f"Ray machine {host}: {line}" for host, lines in zip(machines, said, strict=True) for line in lines]
    if problems:
        raise QuantkitError("; ".join(problems))


def _machines() -> list[dict[str, Any]]:
    """The machines of the cluster that have what an engine runs on."""
    found = _alive()
    if not found:
        raise QuantkitError(f"the Ray cluster has no {_kind()} to run vLLM on: add machines to it, or leave out --on")
    return found


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(_kind(), 0) >= 1]


def _kind() -> str:
    return "CPU" if vllm_environment.is_cpu_build() else "GPU"


def _engines(num_requests: int) -> Engines:
    """An engine for each GPU or, on half of its cores as without Ray, for each machine; no more than have work."""
    most = -(-num_requests // _BATCH)
    machines = [node["Resources"] for node in _machines()]
    if vllm_environment.is_cpu_build():
        return Engines(min(len(machines), most), {"CPU": max(int(min(each["CPU"] for each in machines)) // 2, 1)})
    return Engines(min(sum(int(each["GPU"]) for each in machines), most), {"GPU": 1})


@contextmanager
def _watched(engines: Engines) -> Iterator[None]:
    """While the block runs, end this process with a line when machines went and the others cannot hold the engines.

    An engine that dies is started again where there is room, and asked again what it had in hand. Where there is none
    Ray would wait for a new machine, for ever.
    """
    asked, done = {node["NodeManagerAddress"] for node in _alive()}, threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_EVERY_S):
            left = _alive()
            room = sum(
                min(int(node["Resources"][kind]) // count for kind, count in engines.takes.items()) for node in left
            )
            lost = asked - {node["NodeManagerAddress"] for node in left}
            if lost and room < engines.number:
                # where a child's errors are looked for; not raised, as the main thread is waiting for the cluster
                sys.stderr.write(f"\n{QuantkitError.__module__}.{QuantkitError.__name__}: {_gone(lost)}\n")
                sys.stderr.flush()
                os._exit(1)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _gone(lost: set[str]) -> str:
    return (
        f"Ray machine {', '.join(sorted(lost))} is gone, and the others have no room for its engines: start the same "
        "command again; it goes on with what has no answer yet, on the machines that there are"
    )


def _row(request: Request) -> dict[str, Any]:
    """A request as Ray Data takes it to an engine.

    No value may be missing in one row and there in another: in a table of both, whole numbers become floats, and vLLM
    then waits for ever for a request whose seed it could not read. A greedy request has no use for its seed.
    """
    sampling = offline_worker.sampling_settings(request) | {"seed": request.seed or 0}
    assert request.seed is not None or request.temperature == 0
    assert not request.prompt_logprobs
    del sampling["prompt_logprobs"]
    return {"name": request.name, "tokenized_prompt": request.prompt, "sampling_params": sampling}


def _own_stop_tokens(model: str) -> set[int]:
    """The tokens at which vLLM ends an answer of this checkpoint, asked or not."""
    from vllm.transformers_utils.config import try_get_generation_config

    config = try_get_generation_config(model, trust_remote_code=False)
    ends = None if config is None else config.to_diff_dict().get("eos_token_id")
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _result(request: Request, tokens: Sequence[int], ends: set[int]) -> Result:
    """Ray does not hand on why an answer ended: its last token tells."""
    said = [int(token) for token in tokens]
    stopped = said[-1] in ends.union(request.stop_token_ids)
    return Result(name=request.name, tokens=said, finished="stop" if stopped else "length")


if __name__ == "__main__":
    main()
