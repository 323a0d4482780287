"""Batches through vLLM in a child process: what becomes of the child."""

import os
import signal
from pathlib import Path

import pytest

from quantkit.offline import Job, Request, Session

pytestmark = pytest.mark.vllm


def test_an_interrupted_job_leaves_no_child(tiny_llama: Path, tmp_path: Path) -> None:
    job = Job(model=str(tiny_llama), requests=[Request(name="one", prompt=[1, 2, 3])], max_model_len=64)
    session = Session()

    def interrupt(_done: int, _total: int) -> None:
        if session._child is not None:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            session.run(job, tmp_path, on_result=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert session._child is not None
    group = session._child.pid
    assert session._child.wait(timeout=10) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)
    session.close()
