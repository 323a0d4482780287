"""Batches through vLLM in a child process: what becomes of the child."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit import tokens
from quantkit.checkpoint import open_checkpoint, write_dense
from quantkit.offline import Job, Request, Session

pytestmark = pytest.mark.vllm


def test_an_interrupted_job_leaves_no_child(tiny_llama: Path, tmp_path: Path) -> None:
    job = Job(model=str(tiny_llama), requests=[Request(name="one", prompt=[1, 2, 3])], max_model_len=64)
    session = Session()

    def interrupt(_done: int, _total: int) -> None:
        if session._children:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            session.run(job, tmp_path, on_result=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    (child,) = session._children.values()
    group = child.process.pid
    assert child.process.wait(timeout=10) == -signal.SIGKILL
    end_s = time.monotonic() + 10  # who watches over the child is in its group, and init's to bury
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end_s:
            os.killpg(group, 0)
            time.sleep(0.05)
    session.close()


def test_a_draft_with_kv_scales_serves_a_target_without(
    make_scaled: Callable[..., Path], tiny_llama: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same weights as target and draft: what is proposed is accepted, in one type of cache for both.

    But for near ties, of which random weights have many: packed and dense weights are multiplied by different kernels.
    """
    draft = make_scaled(tiny_llama, texts[0], tmp_path / "draft")
    windows = tokens.tokenize([str(texts[1])], tokens.load_tokenizer(tiny_llama), samples=16, length=16, seed=0)
    write_dense(open_checkpoint(draft), tmp_path / "target")
    requests = [Request(name=str(row), prompt=ids.tolist()) for row, ids in enumerate(windows.input_ids_ST)]
    job = Job(
        model=str(tmp_path / "target"), draft=str(draft), speculative_tokens=3, max_model_len=128,
        requests=[request.model_copy(update={"max_tokens": 24}) for request in requests],
    )  # fmt: skip
    with Session() as session:
        _, counted = session.run(job, tmp_path / "job")
    assert counted is not None and counted.drafts > 0
    assert counted.accepted / counted.proposed > 0.8, counted
