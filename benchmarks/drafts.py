"""Drafts side by side: same target, same texts, same number of steps; what each way of training gives.

Each row trains one draft in a process of its own, and is kept in `--out`; run again to go on, or to add rows. Texts
are answered once, half of them at temperature 0 and half at 0.7; a row takes those it learns from. Where drafts start
is made, and judged, once for all rows that start there. After every epoch the accepted length on the validation prompts
is taken, and the CPU seconds until then: the curve. At the end the held-out prompts: text by text by the logits, at
temperatures 0 and 0.7, so that rows are compared in pairs; and with `--serve` by vLLM's own counters, which are all
that there is of an EAGLE-3 head.

    python benchmarks/drafts.py runs/quickstart/target --out runs/drafts --rows all
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import drafts_table
import torch

from quantkit import conversations
from quantkit.checkpoint import Checkpoint, open_checkpoint
from quantkit.conversations import Exchange
from quantkit.draft import acceptance, distil, fit, initialize, teacher, train
from quantkit.engines import run
from quantkit.offline import Session
from quantkit.progress import silent
from quantkit.recipe import Draft

HELD_OUT, VALIDATION = 96, 32
SPECULATIVE_TOKENS = 4
FITTED_ON = 256  # texts


class Row(NamedTuple):
    """A way of training; all rows of a table but those that say otherwise see the same number of exchanges."""

    loss: str = "lk_hybrid"
    texts: int = 200
    epochs: int = 1
    temperature: str = "both"  # that the target answered at: 0, 0.7, or both in turn
    layers: int = 12
    layer_choice: str = "fit"
    fitted: bool = True  # whether the kept layers stand for those left out before they are trained
    learning_rate: float = Draft.model_fields["learning_rate"].default
    batch_size: int = Draft.model_fields["batch_size"].default
    on_prompts: bool = True  # whether prompts teach as well as answers
    kind: Literal["draft_model", "eagle3"] = "draft_model"
    draft_vocab_size: int = Draft.model_fields["draft_vocab_size"].default  # of a head


ROWS = {
    "long, LK hybrid": Row(texts=600, epochs=2),
    "long, cross-entropy": Row("cross_entropy", texts=600, epochs=2),
    "long, forward KL": Row("forward_kl", texts=600, epochs=2),
    "LK hybrid": Row(),
    "LK alpha": Row("lk_alpha"),
    "forward KL": Row("forward_kl"),
    "reverse KL": Row("reverse_kl"),
    "TVD++": Row("tvd++"),
    "total variation": Row("total_variation"),
    "cross-entropy": Row("cross_entropy"),
    "answers alone teach": Row(on_prompts=False),
    "100 texts": Row(texts=100),
    "400 texts": Row(texts=400),
    "texts at 0": Row(temperature="0"),
    "texts at 0.7": Row(temperature="0.7"),
    "evenly spaced layers": Row(layer_choice="evenly"),
    "evenly spaced layers, not fitted": Row(layer_choice="evenly", fitted=False),
    "not fitted": Row(fitted=False),
    "8 layers": Row(layers=8),
    "6 layers": Row(layers=6),
    "learning rate 1e-4": Row(learning_rate=1e-4),
    "learning rate 1e-3": Row(learning_rate=1e-3),
    "batches of 4": Row(batch_size=4),
    "EAGLE-3 head": Row("forward_kl", 200, 2, layers=1, learning_rate=1e-3, kind="eagle3", draft_vocab_size=8000),
}


@click.command()
@click.argument("target", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--rows", default="all", show_default=True, help="Names of rows, separated by ';', or 'all'.")
@click.option("--texts", default=1600, show_default=True, help="Prompts that the target asks itself to learn from.")
@click.option("--threads", default=1, show_default=True)
@click.option("--serve/--no-serve", default=False, help="Whether vLLM counts what it accepts, too.")
@click.option("--one", hidden=True, help="The row that this process trains.")
def main(target: Path, out: Path, rows: str, texts: int, threads: int, serve: bool, one: str | None) -> None:
    """Train the rows that have no result yet, and write the table of all that have one: Markdown, JSON, SVG, PNG."""
    target, out = target.resolve(), out.resolve()
    torch.set_num_threads(threads)
    if one is not None:
        _row(target, out, one)
        return
    names = list(ROWS) if rows == "all" else [name for part in rows.split(";") if (name := part.strip())]
    if missing := [name for name in names if name not in ROWS]:
        raise click.BadParameter(f"no row {'; '.join(missing)}: choose of {'; '.join(ROWS)}")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "pool.json").exists():
        _fill_pool(target, out, texts)
    for name in names:
        if not (_folder(out, name) / "row.json").exists():
            click.echo(f"{name} ...", err=True)
            env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
            words = [sys.executable, __file__, str(target), "--out", str(out), "--threads", str(threads), "--one", name]
            subprocess.run(words, env=env, check=True)
    if serve:
        _serve(target, out, names)
    print(drafts_table.write(out))


def _folder(out: Path, name: str) -> Path:
    return out / name.replace(",", "").replace(" ", "_")


def _fill_pool(target: Path, out: Path, count: int) -> None:
    """Have the target ask itself and answer: training prompts at either temperature, the others as they are judged."""

    def report(what: str, done: int, total: int) -> None:
        if total > 0 and done % max(total // 8, 1) == 0:
            click.echo(f"{time.strftime('%H:%M:%S')} {what} {done}/{total}", err=True)

    settings = Draft(keep_layers=1)
    speaking = distil.speaking_target(open_checkpoint(target), out)
    with Session() as session:
        asked = conversations.prompts(
            session, f"self:{count + HELD_OUT + VALIDATION}", speaking, purpose=conversations.Purpose.DRAFT,
            longest=settings.prompt_tokens, seed=0, folder=out, report=report, held_out=HELD_OUT + VALIDATION,
        )  # fmt: skip
        held_out, validation, training = conversations.split(asked, (HELD_OUT, VALIDATION), seed=0)
        parts = [("training", training[::2], 0.0), ("training", training[1::2], 0.7), ("validation", validation, 0.0)]
        for what, prompts, heat in [*parts, ("held-out", held_out, 0.0), ("held-out", held_out, 0.7)]:
            found = conversations.answers(
                session, speaking, prompts, longest=settings.answer_tokens, seed=0, folder=out / f"{what}-{heat:g}",
                report=report, temperatures=(heat,),
            )  # fmt: skip
            conversations.save_exchanges(out / f"{what}-{heat:g}.jsonl", found)
    (out / "pool.json").write_text(json.dumps({"training": len(training)}))


def _texts(out: Path, row: Row) -> list[Exchange]:
    """What a row learns from: the first texts of the pool."""
    cold, warm = (conversations.load_exchanges(out / f"training-{heat}.jsonl") for heat in ("0", "0.7"))
    if row.temperature == "both":
        return [text for pair in zip(cold, warm, strict=False) for text in pair][: row.texts]
    return {"0": cold, "0.7": warm}[row.temperature][: row.texts]


def _row(target_path: Path, out: Path, name: str) -> None:
    """Train a row's draft and judge it."""
    row, target, folder = ROWS[name], open_checkpoint(target_path), _folder(out, name)
    folder.mkdir(exist_ok=True)
    if not (folder / "trained.json").exists():
        trained = _train_head(target, out, row, folder) if row.kind == "eagle3" else _train(target, out, name)
        (folder / "trained.json").write_text(json.dumps({"name": name, **row._asdict(), **trained}))
    facts = json.loads((folder / "trained.json").read_text())
    judged = _judge(target, out, folder / "made") if row.kind == "draft_model" else None
    (folder / "row.json").write_text(json.dumps({**facts, "acceptance": judged}))


def _train(target: Checkpoint, out: Path, name: str) -> dict[str, Any]:
    row, folder = ROWS[name], _folder(out, name)
    shutil.rmtree(folder / "state", ignore_errors=True)  # the seconds of a row are those of one process
    start = _start(target, out, row)
    fit_s = json.loads((start / "start.json").read_text())["cpu_s"]
    texts = distil.lessons(_texts(out, row)) if row.on_prompts else _texts(out, row)
    said_folder = out / f"said-{row.temperature}-{row.texts}{'-on-prompts' if row.on_prompts else ''}"
    said = teacher.listen(target, texts, top_k=None, device="cpu", folder=said_folder, report=silent)
    validation = conversations.load_exchanges(out / "validation-0.jsonl")
    plan = train.Plan(
        row.loss, row.epochs, row.batch_size, row.learning_rate, Draft.model_fields["warmup"].default, row.epochs,
        False, SPECULATIVE_TOKENS, 0,
    )  # fmt: skip
    begin_s, epochs_s = time.process_time() - fit_s, []

    def report(what: str, done: int, total: int) -> None:
        spent_s = time.process_time() - begin_s
        if done % (total // row.epochs) == 0:
            epochs_s.append(round(spent_s, 1))
        if done % 10 == 0:
            click.echo(f"{time.strftime('%H:%M:%S')} {name}: {what} {done}/{total} {spent_s:.0f} CPU s", err=True)

    trained = train.train(
        start / "initial", train.Material(texts, said, validation), plan, folder=folder, report=report
    )
    config = open_checkpoint(start / "initial").config
    weights = train.load_weights(trained.weights)
    initialize.write_draft(folder / "made", config, weights, companions=target.path)
    return {
        "start": start.name, "epochs_cpu_s": epochs_s, "tokens": trained.tokens, "losses": trained.losses,
        "lengths": trained.accepted_lengths, "steps": trained.steps,
    }  # fmt: skip


def _train_head(target: Checkpoint, out: Path, row: Row, folder: Path) -> dict[str, Any]:
    texts = distil.lessons(_texts(out, row))
    conversations.save_exchanges(folder / "exchanges.jsonl", texts)
    settings = Draft(
        kind="eagle3", epochs=row.epochs, batch_size=row.batch_size, learning_rate=row.learning_rate,
        draft_vocab_size=row.draft_vocab_size, speculative_tokens=SPECULATIVE_TOKENS,
    )  # fmt: skip
    dense = open_checkpoint(distil.dense_target(target, out))

    def report(what: str, done: int, total: int) -> None:
        click.echo(f"{time.strftime('%H:%M:%S')} {what} {done}/{total}", err=True)

    made = run.train_head(
        "speculators", dense, folder / "exchanges.jsonl", settings, seed=0, out=folder / "made", device="cpu",
        folder=folder, report=report,
    )  # fmt: skip
    tokens = sum(len(text.answer) for text in texts)
    return {"epochs_cpu_s": [made["engine"]["cpu_s"]], "tokens": tokens, "losses": made["epoch_losses"], **made}


def _start(target: Checkpoint, out: Path, row: Row) -> Path:
    """Where a row's draft begins: `layers`, as they are in the target; `initial`, fitted; start.json, what both give.

    Whatever a row learns from, the layers are chosen and fitted on the same texts, the first of both temperatures.
    """
    folder = out / "starts" / f"{row.layers}-{row.layer_choice}{'-fitted' if row.fitted else ''}"
    if (folder / "start.json").exists():
        return folder
    texts = [text.prompt + text.answer for text in _texts(out, Row(texts=FITTED_ON))]
    begin_s = time.process_time()
    kept, weights = _layers(target, row, texts)
    spent_s = time.process_time() - begin_s
    config, untouched = initialize.from_layers(target, kept)
    found: dict[str, Any] = {"kept": kept, "cpu_s": round(spent_s, 1)}
    for when, changed in (("layers", {}), ("initial", weights)):
        initialize.write_draft(folder / when, config, untouched | changed, companions=target.path)
        same = when == "initial" and not changed
        found[when] = found["layers"] if same else _judge(target, out, folder / when, heats=("0",))["0"]
    (folder / "start.json").write_text(json.dumps(found))
    return folder


def _layers(target: Checkpoint, row: Row, texts: list[list[int]]) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Which of the target's layers a draft begins with, and their weights where these were fitted."""
    if row.layer_choice == "evenly":
        kept = initialize.evenly_spaced(target.arch.num_layers, row.layers)
    else:
        kept = fit.choose(target, texts, row.layers, device="cpu", report=silent)
    return kept, fit.fitted(target, kept, texts, device="cpu", report=silent) if row.fitted else {}


def _judge(target: Checkpoint, out: Path, draft: Path, *, heats: Sequence[str] = ("0", "0.7")) -> dict[str, Any]:
    """What the logits say of a draft on the held-out prompts, together and text by text (drafts, accepted tokens)."""
    model, found = train.build_model(open_checkpoint(draft), dtype=torch.float32).eval(), {}
    for heat in heats:
        held_out = conversations.load_exchanges(out / f"held-out-{heat}.jsonl")
        folder = out / f"said-held-out-{heat}"
        heard = teacher.listen(target, held_out, top_k=None, device="cpu", folder=folder, report=silent)
        parts = train.offline_acceptance(model, held_out, heard, temperature=float(heat), k=SPECULATIVE_TOKENS)
        texts = {how: [(getattr(part, how).drafts, getattr(part, how).accepted) for part in parts]
                 for how in ("greedy", "sampled")}  # fmt: skip
        found[heat] = acceptance.together(parts).summary() | {"texts": texts}
    return found


def _serve(target: Path, out: Path, names: list[str]) -> None:
    """What vLLM accepts of each row's draft on the held-out prompts, at temperature 0."""
    speaking = distil.speaking_target(open_checkpoint(target), out)
    held_out = conversations.load_exchanges(out / "held-out-0.jsonl")
    with Session() as session:
        for name in names:
            folder = _folder(out, name)
            if not (folder / "vllm.json").exists():
                counted = acceptance.measure(
                    session, speaking, folder / "made", held_out, k=SPECULATIVE_TOKENS, method=ROWS[name].kind,
                    longest=Draft.model_fields["answer_tokens"].default, folder=folder / "vllm", report=silent,
                    what=name,
                )  # fmt: skip
                (folder / "vllm.json").write_text(json.dumps(counted.summary()))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
