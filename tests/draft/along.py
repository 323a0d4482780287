"""A process of a job that trains a draft, by any launcher: `python -m tests.draft.along TARGET EXCHANGES OUT`."""

import json
import sys
from pathlib import Path

import torch

from quantkit import conversations, ranks
from quantkit.checkpoint import open_checkpoint
from quantkit.draft import initialize, teacher, train
from quantkit.progress import silent

PLAN = train.Plan("forward_kl", 3, 4, 2e-3, 0.1, 3, False, 3, 0)
LESSONS = 9  # of the exchanges; the others say when to stop


def main(target: Path, exchanges: Path, out: Path) -> None:
    """Train, and on rank 0 write what was seen into OUT/training.json."""
    torch.set_num_threads(1)
    with ranks.joined("cpu") as device:
        if ranks.rank() > 0:
            ranks.follow(device)
            return
        with ranks.leading() as hand_out:
            checkpoint, initial, texts = (
                open_checkpoint(target),
                out / "initial",
                conversations.load_exchanges(exchanges),
            )
            config, weights = initialize.from_layers(checkpoint, [0, 3])
            initialize.write_draft(initial, config, weights, companions=target)
            said = teacher.listen(
                checkpoint, texts[:LESSONS], top_k=None, device="cpu", folder=out / "said", report=silent
            )
            material = train.Material(texts[:LESSONS], said, texts[LESSONS:])
            hand_out(train.Order(initial, material, PLAN, out))
            found = train.train(initial, material, PLAN, folder=out, report=silent)
            (out / "training.json").write_text(json.dumps(found._replace(weights=str(found.weights))._asdict()))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
