"""Reference and candidate over the same windows, one decoder layer in memory at a time: nll, KL and agreement."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit import decoder
from quantkit.checkpoint import Checkpoint, save_tensors
from quantkit.progress import Report
from quantkit.tokens import TokenSet

_ROWS = 256  # positions whose logits stand in memory at a time


class Scores(NamedTuple):
    """Per window and scored token (tokens 1.. of each window; the first has nothing to be predicted from)."""

    reference_nll_ST: Tensor  # nats
    candidate_nll_ST: Tensor  # nats
    kl_ST: Tensor  # KL(reference || candidate), nats
    same_top1_ST: Tensor  # bool: both have the same most likely token


def hidden_states(
    checkpoint: Checkpoint, tokens: TokenSet, *, device: str, batch_size: int, what: str, report: Report
) -> Tensor:
    """The last decoder layer's output for every window: float32 [S, T, C]."""
    arch = checkpoint.arch
    rotary = decoder.rotation(checkpoint.config, tokens.input_ids_ST.shape[1], dtype=torch.float32, device=device)
    hidden_STC = checkpoint.outer()["model.embed_tokens.weight"][tokens.input_ids_ST]
    for index in range(arch.num_layers):
        report(what, index, arch.num_layers)
        weights = {name: tensor.to(device) for name, tensor in checkpoint.layer(index).items()}
        for begin in range(0, len(hidden_STC), batch_size):
            part = hidden_STC[begin : begin + batch_size].to(device)
            hidden_STC[begin : begin + batch_size] = decoder.layer(weights, arch, part, rotary).cpu()
    report(what, arch.num_layers, arch.num_layers)
    return hidden_STC


def compare(
    reference: Checkpoint, candidate: Checkpoint, tokens: TokenSet, *, device: str, batch_size: int, folder: Path,
    report: Report,
) -> Scores:  # fmt: skip
    """Score every window under both checkpoints. Computed in float32 from the (dequantized) weights.

    `folder` keeps the hidden states of both, so that an interrupted evaluation goes on after the last whole pass.
    """
    states = []
    with torch.no_grad():
        for name, checkpoint in (("reference", reference), ("candidate", candidate)):
            kept = folder / f"{name}.safetensors"
            if not kept.exists():
                hidden = hidden_states(
                    checkpoint, tokens, device=device, batch_size=batch_size, what=f"the {name} reads, layer",
                    report=report,
                )  # fmt: skip
                save_tensors(kept, {"hidden": hidden})
            states.append(load_file(kept)["hidden"])
        return _score(reference, candidate, states[0], states[1], tokens, device=device, report=report)


def _score(
    reference: Checkpoint, candidate: Checkpoint, reference_STC: Tensor, candidate_STC: Tensor, tokens: TokenSet,
    *, device: str, report: Report,
) -> Scores:  # fmt: skip
    heads = [{name: t.to(device) for name, t in c.outer().items()} for c in (reference, candidate)]
    windows: list[list[Tensor]] = []
    for number, ids in enumerate(tokens.input_ids_ST):
        report("comparing, window", number, len(tokens.input_ids_ST))
        parts = []
        for begin in range(0, len(ids) - 1, _ROWS):
            positions = slice(begin, min(begin + _ROWS, len(ids) - 1))
            wanted = ids[positions.start + 1 : positions.stop + 1].to(device)
            first = decoder.head(heads[0], reference.arch, reference_STC[number, positions].to(device))
            second = decoder.head(heads[1], candidate.arch, candidate_STC[number, positions].to(device))
            parts.append(score_logits(first, second, wanted))
        windows.append([torch.cat(column).cpu() for column in zip(*parts, strict=True)])
    report("comparing, window", len(windows), len(windows))
    return Scores(*(torch.stack(column) for column in zip(*windows, strict=True)))


def score_logits(reference_NV: Tensor, candidate_NV: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll of both, KL(reference || candidate) and top-1 agreement of N positions, from their logits."""
    first, second = reference_NV.float().log_softmax(-1), candidate_NV.float().log_softmax(-1)
    kl = (first.exp() * (first - second)).sum(-1)
    column = wanted_N[:, None]
    return (
        -first.gather(-1, column)[:, 0],
        -second.gather(-1, column)[:, 0],
        kl,
        first.argmax(-1) == second.argmax(-1),
    )
