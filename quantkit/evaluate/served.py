"""The same tokens scored by the real vLLM: its kernels, its packing, its KV cache."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantkit import hardware, offline, vllm_environment
from quantkit.errors import QuantkitError
from quantkit.evaluate.windows import Windows
from quantkit.offline import Session
from quantkit.progress import Report


def check_cache(kv_caches: Sequence[str]) -> None:
    """Refuse a type of KV cache that is asked for and that the installed vLLM can not keep here.

    Raises:
        QuantkitError: a quantized cache on vLLM's CPU build, which knows FP8 alone, and that with AVX-512 alone.
    """
    for kind in kv_caches:
        if kind != "auto" and (reason := not_kept(kind)):
            raise QuantkitError(f"{reason}: leave out --served and --task, or --kv-cache {kind}")


def not_kept(kind: str) -> str | None:
    """Why the installed vLLM does not keep a cache of this type here; None where it does."""
    if kind in ("auto", "float16", "bfloat16") or not vllm_environment.is_cpu_build():
        return None
    if not kind.startswith("fp8") or kind.endswith("_per_token_head"):
        return f"vLLM's CPU build does not keep a KV cache of the type {kind}, and answers noise instead of saying so"
    if hardware.lacks_avx512():
        return "vLLM's CPU build keeps an FP8 KV cache on processors with AVX-512 alone"
    return None


def nll(
    session: Session, checkpoint: Path, windows: Windows, *, context: int | None, kv_cache: str, folder: Path,
    report: Report, what: str,
) -> Tensor:  # fmt: skip
    """Nats of every scored token, [N] float64, in the order of `divergence.Scores`.

    context: the longest sequence that the model takes.

    Raises:
        QuantkitError: windows that leave vLLM no room for the one token that it must write; no vLLM.
    """
    lengths = windows.lengths_S.tolist()
    room = max(lengths) + 1
    if context is not None and room > context:
        raise QuantkitError(
            f"windows of {max(lengths)} tokens leave no room in the model's context of {context} tokens for the one "
            f"that vLLM must write: lower evaluate.length by {room - context}"
        )
    rows = [ids[:length] for ids, length in zip(windows.input_ids_ST.tolist(), lengths, strict=True)]
    job = offline.windows_job(checkpoint, rows, max_num_seqs=8, kv_cache_dtype=kv_cache)
    found, _ = session.run(job, folder, on_result=lambda done, total: report(what, done, total))
    parts = []
    for result, scored_T in zip(found, windows.scored_ST, strict=True):
        assert result.prompt_logprobs is not None
        logprobs = torch.tensor(result.prompt_logprobs, dtype=torch.float64)
        parts.append(-logprobs[scored_T[1 : len(logprobs) + 1]])
    return torch.cat(parts)
