"""The whole way from a target to its draft: prompts, answers, acceptance before, training, acceptance after."""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit import artifacts, conversations, ranks, speculation, vllm_environment
from quantkit.checkpoint import Checkpoint, open_checkpoint, write_dense
from quantkit.conversations import Exchange
from quantkit.draft import acceptance, fit, initialize, plan, teacher, train
from quantkit.draft.acceptance import Acceptance, Offline
from quantkit.draft.teacher import Teacher
from quantkit.errors import QuantkitError, raise_all
from quantkit.offline import Session
from quantkit.progress import LINE, Report
from quantkit.recipe import Draft

# vLLM takes the kind of speculation from these words anywhere in a draft's path, whatever `method` says
PATH_TRAPS = ("eagle-", "eagle3", "dflash", "dspark")
MEASURED_AT = (0.0, 0.7)  # temperatures
_FITTED_TOKENS = 32  # an input of down_proj, that layers are fitted on
_APART = 2.0  # standard errors that vLLM's count and the logits' may differ by

# Writes a 4-bit copy of a draft (second path), calibrated on texts of the target's.
Quantizer = Callable[[Path, Path, Sequence[list[int]]], None]
# Writes a head (third path) for a dense target (first), trained on its exchanges (a file), and says how that went.
HeadTrainer = Callable[[Path, Path, Path], dict[str, Any]]


class Texts(NamedTuple):
    """Exchanges by what they are for; a prompt is in one of them alone."""

    training: list[Exchange]
    validation: list[Exchange]  # greedy answers
    held_out: dict[float, list[Exchange]]  # answers at each temperature that acceptance is measured at


class Judged(NamedTuple):
    """A draft's acceptance by temperature; vLLM's own counters where its build speculates rightly.

    offline: empty for a head, which has no logits without its target.
    """

    offline: dict[float, Offline]
    vllm: dict[float, Acceptance]

    def summary(self) -> dict[str, Any]:
        """For manifests and reports, by temperature as a word."""
        return {
            f"{temperature:g}": ({"offline": self.offline[temperature].summary()} if self.offline else {})
            | ({"vllm": self.vllm[temperature].summary()} if temperature in self.vllm else {})
            for temperature in self.offline or self.vllm
        }


def train_draft(
    target_path: Path, *, settings: Draft, seed: int, out: Path, folder: Path, report: Report,
    quantize: Quantizer | None = None, train_head: HeadTrainer | None = None,
    hand_out: ranks.HandOut = lambda order: None, cluster: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a trained draft into `out` and return what its manifest says; `folder` keeps what a resumed run needs.

    quantize: makes the draft's own 4-bit weights; acceptance is measured again with them, and the better one is kept.
    train_head: trains a draft of the kind eagle3, which is none of a model's own and is not quantized.
    hand_out: tells the processes that torchrun started beside this one to train along.
    cluster: address of a Ray cluster on which target and draft write and answer, instead of here; what is counted and
        timed of the draft is here in any case.

    Raises:
        QuantkitError: a draft of another vocabulary, too few prompts, a path that vLLM would misread, no vLLM.
    """
    target = open_checkpoint(target_path)
    _check(target, settings, out)
    speaking = speaking_target(target, folder)
    # one process for all of vLLM's work here: importing it takes longer than a job
    with Session(cluster=cluster) as session:
        texts = _texts(session, speaking, settings, seed, folder, report)
        taught = lessons(texts.training)
        if settings.kind == "eagle3":
            assert train_head is not None
            return _with_head(session, target, speaking, texts, taught, train_head, settings, seed, out, folder, report)
        untouched, initial, origin = _initialize(target, settings, texts.training, folder, report)
        said = _said(target, taught, settings, folder / "said", report)
        judge = _Judge(session, target, speaking, texts.held_out, settings, seed, folder, report)
        before = judge.measure(untouched, "before")
        material = train.Material(taught, said, texts.validation)
        course = train.Plan(
            settings.loss, settings.epochs, settings.batch_size, settings.learning_rate, settings.warmup,
            settings.patience, settings.on_policy > 0, settings.speculative_tokens, seed,
        )  # fmt: skip
        hand_out(train.Order(initial, material, course, folder))
        replay = _replay(session, target, texts.training, settings, seed, initial, report)
        training = train.train(initial, material, course, folder=folder, report=report, replay=replay)
        trained = folder / "trained"
        initialize.write_draft(
            trained, open_checkpoint(initial).config, train.load_weights(training.weights), companions=target_path
        )
        judged = {"before": before, "after": judge.measure(trained, "after")}
        fitted = {} if initial == untouched else judge.by_logits(initial)
        made = {"after": trained}
        if quantize is not None:
            made["quantized"] = folder / "quantized"
            if not (made["quantized"] / "config.json").exists():
                quantize(trained, made["quantized"], [text.prompt + text.answer for text in texts.training])
            judged["quantized"] = judge.measure(made["quantized"], "quantized")
        plans = plan.plans(
            session, target_path, made, {name: judged[name].vllm[0.0] for name in made}, folder=folder / "steps",
            report=report,
        )  # fmt: skip
    # A GPU is what a draft is for, measured where there is one; by that plan the better draft is kept.
    on_gpu = {name: next(each for each in found if each.profile == "gpu") for name, found in plans.items()}
    chosen = max(on_gpu, key=lambda name: on_gpu[name].loads[0].best.speedup)
    for file in sorted(made[chosen].iterdir()):
        shutil.copy2(file, out / file.name)
    conversations.save_exchanges(out / "held_out.jsonl", texts.held_out[0.0])
    for line in (apart := _apart(judged)):
        report(line, 0, LINE)
    return {
        "kind": settings.kind,
        "origin": origin,
        "train_prompts": len(texts.training),
        "validation_prompts": len(texts.validation),
        "held_out_prompts": len(texts.held_out[0.0]),
        "tokens": training.tokens,  # an epoch, of prompts and answers
        "answer_temperatures": list(settings.temperatures),
        "steps": training.steps,
        "loss": settings.loss,
        "epoch_losses": [round(loss, 4) for loss in training.losses],
        "epoch_accepted_lengths": [round(length, 4) for length in training.accepted_lengths],
        "best_epoch": training.best_epoch,
        "speculative_tokens": settings.speculative_tokens,
        "target_weights": _weights(target, speaking),
        "acceptance": {name: each.summary() for name, each in judged.items()},
        "fitted": {f"{temperature:g}": each.summary() for temperature, each in fitted.items()},  # before training
        "expected_speed_up": {
            name: {each.profile: each.loads[0].best.speedup for each in found} for name, found in plans.items()
        },
        "kept": chosen,
        "kept_by": f"expected speed-up on GPUs, one sequence at once: {on_gpu[chosen].basis}",
        "engine_and_logits_apart": apart,
    } | speculation.summary(plans[chosen])


def _with_head(
    session: Session, target: Checkpoint, speaking: Path, texts: Texts, taught: list[Exchange],
    train_head: HeadTrainer, settings: Draft, seed: int, out: Path, folder: Path, report: Report,
) -> dict[str, Any]:  # fmt: skip
    """A head on the target's own states, by another engine; vLLM counts on the prompts that a draft model is judged by.

    Nothing is measured before training: an untrained head proposes noise.
    """
    trained, exchanges, facts_path = folder / "trained", folder / "exchanges.jsonl", folder / "head.json"
    if not facts_path.exists():
        conversations.save_exchanges(exchanges, taught)
        artifacts.write_json(facts_path, train_head(dense_target(target, folder), exchanges, trained))
    facts: dict[str, Any] = json.loads(facts_path.read_bytes())
    judged = Judged({}, _counted(session, speaking, trained, texts.held_out, settings, seed, folder, report, "after"))
    plans = plan.plans(
        session, target.path, {"after": trained}, {"after": judged.vllm[0.0]}, method=settings.kind,
        folder=folder / "steps", report=report,
    )["after"]  # fmt: skip
    for file in sorted(trained.iterdir()):
        shutil.copy2(file, out / file.name)
    conversations.save_exchanges(out / "held_out.jsonl", texts.held_out[0.0])
    return {
        "kind": settings.kind,
        "origin": "an untrained head on the target's states",
        "train_prompts": len(texts.training),
        "held_out_prompts": len(texts.held_out[0.0]),
        "tokens": sum(len(exchange.answer) for exchange in taught),  # an epoch, of prompts and answers
        "answer_temperatures": list(settings.temperatures),
        "loss": "forward_kl",  # the engine's; a draft model's own is not asked of it
        "speculative_tokens": settings.speculative_tokens,
        "target_weights": _weights(target, speaking),
        "acceptance": {"after": judged.summary()},
        "before": "not measured: an untrained head proposes noise",
        "expected_speed_up": {"after": {each.profile: each.loads[0].best.speedup for each in plans}},
        "kept": "after",
        **facts,
        **speculation.summary(plans),
    }


def _check(target: Checkpoint, settings: Draft, out: Path) -> None:
    """What can be seen to be wrong before any work, all at once."""
    problems = []
    for word in PATH_TRAPS if settings.kind == "draft_model" else ():  # whoever names eagle3 is taken at the word
        if word in str(out.resolve()).lower():
            problems.append(
                f"{out.resolve()} has {word!r} in its path, and vLLM would take the draft for another kind of "
                "speculator: choose another --out"
            )
    context = target.config.get("max_position_embeddings")
    needed = settings.prompt_tokens + settings.answer_tokens + settings.speculative_tokens + 1
    if context is not None and needed > context:
        problems.append(
            f"prompts of {settings.prompt_tokens} and answers of {settings.answer_tokens} tokens, with "
            f"{settings.speculative_tokens} draft tokens, do not fit the target's context of {context}: lower "
            "draft.prompt_tokens or draft.answer_tokens"
        )
    raise_all(problems)
    if settings.kind == "eagle3":
        return
    if settings.keep_layers is not None:
        initialize.check_keep_layers(target, settings.keep_layers)
    else:
        assert settings.init is not None
        initialize.check_family(target, open_checkpoint(Path(settings.init)))


def speaking_target(target: Checkpoint, folder: Path) -> Path:
    """The checkpoint that vLLM runs to hear the target: itself, or on a CPU a dequantized copy.

    vLLM's 4-bit CPU kernel is made for a few sequences at once: with 128 of them the dequantized weights in bfloat16
    finished prompts at about twice its rate.
    """
    return dense_target(target, folder) if vllm_environment.is_cpu_build() else target.path


def dense_target(target: Checkpoint, folder: Path) -> Path:
    """The target with dequantized weights: itself, or a copy."""
    if target.storage is None:
        return target.path
    dense = folder / "dense-target"
    if not (dense / "config.json").exists():
        write_dense(target, dense)
    return dense


def _texts(
    session: Session, speaking: Path, settings: Draft, seed: int, folder: Path, report: Report
) -> Texts:  # fmt: skip
    """The target's answers to prompts that are drawn apart before any is answered."""
    asked = conversations.prompts(
        session, settings.prompts, speaking, purpose=conversations.Purpose.DRAFT, longest=settings.prompt_tokens,
        seed=seed, folder=folder, report=report, held_out=settings.held_out_prompts + settings.validation_prompts,
    )  # fmt: skip
    sizes = (settings.held_out_prompts, settings.validation_prompts)
    held_out, validation, training = conversations.split(asked, sizes, seed=seed)

    def answered(prompts: list[list[int]], temperatures: Sequence[float], what: str) -> list[Exchange]:
        found = conversations.answers(
            session, speaking, prompts, longest=settings.answer_tokens, seed=seed, folder=folder / what, report=report,
            temperatures=temperatures, what=f"the target answers, {what}",
        )  # fmt: skip
        if not found:
            raise QuantkitError(f"the target has no answer to any of {len(prompts)} prompts ({what}): give other ones")
        return found

    return Texts(
        answered(training, settings.temperatures, "training"),
        answered(validation, (0.0,), "validation"),
        {heat: answered(held_out, (heat,), f"held-out-{heat:g}") for heat in MEASURED_AT},
    )  # fmt: skip


def lessons(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """The exchanges with all but the beginning that all prompts share as answers: prompts teach as well.

    The target reads them anyway, and what it would say within them is as good to learn as what it says behind them.
    """
    columns = zip(*(exchange.prompt for exchange in exchanges), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns)) or 1
    return [Exchange(prompt[:shared], prompt[shared:] + answer) for prompt, answer in exchanges]


def _initialize(
    target: Checkpoint, settings: Draft, training: Sequence[Exchange], folder: Path, report: Report
) -> tuple[Path, Path, str]:
    """Write the draft as it was and as training will find it (the same, or fitted), and say where it comes from."""
    untouched, fitted = folder / "untouched", folder / "fitted"
    if settings.keep_layers is None:
        assert settings.init is not None
        source = open_checkpoint(Path(settings.init))
        if not (untouched / "config.json").exists():
            config, weights = initialize.from_checkpoint(target, source)
            initialize.write_draft(untouched, config, weights, companions=target.path)
        return untouched, untouched, f"checkpoint {source.path.name}"
    texts = [text.prompt + text.answer for text in training]
    if settings.layer_choice == "evenly":
        kept = initialize.evenly_spaced(target.arch.num_layers, settings.keep_layers)
    else:
        kept = fit.choose(target, texts, settings.keep_layers, device="cpu", report=report)
    if not (untouched / "config.json").exists():
        config, weights = initialize.from_layers(target, kept)
        initialize.write_draft(untouched, config, weights, companions=target.path)
    if settings.fit and not (fitted / "config.json").exists():
        begin = fit.first(texts, _FITTED_TOKENS * target.arch.intermediate_size)
        config, weights = initialize.from_layers(target, kept)
        weights |= fit.fitted(target, kept, begin, device="cpu", report=report)
        initialize.write_draft(fitted, config, weights, companions=target.path)
    origin = f"layers {', '.join(map(str, kept))} of the target" + (", fitted" if settings.fit else "")
    return untouched, fitted if settings.fit else untouched, origin


def _said(
    target: Checkpoint, exchanges: Sequence[Exchange], settings: Draft, folder: Path, report: Report
) -> Teacher:  # fmt: skip
    if settings.loss == train.CROSS_ENTROPY:
        return teacher.silent(target)
    return teacher.listen(target, exchanges, top_k=settings.top_k, device="cpu", folder=folder, report=report)


class _Judge:
    """Measures drafts on the held-out prompts, by their logits and by vLLM."""

    def __init__(
        self, session: Session, target: Checkpoint, speaking: Path, held_out: dict[float, list[Exchange]],
        settings: Draft, seed: int, folder: Path, report: Report,
    ) -> None:  # fmt: skip
        self.session, self.speaking, self.held_out = session, speaking, held_out
        self.settings, self.seed, self.folder, self.report = settings, seed, folder, report
        self.said: dict[float, Teacher] = {
            heat: teacher.listen(
                target, texts, top_k=None, device="cpu", folder=folder / f"said-held-out-{heat:g}", report=report
            )
            for heat, texts in held_out.items()
        }

    def by_logits(self, draft: Path) -> dict[float, Offline]:
        """Acceptance at every temperature, without vLLM."""
        model = train.build_model(open_checkpoint(draft), dtype=torch.float32).eval()
        k = self.settings.speculative_tokens
        return {
            heat: acceptance.together(train.offline_acceptance(model, texts, self.said[heat], temperature=heat, k=k))
            for heat, texts in self.held_out.items()
        }

    def measure(self, draft: Path, when: str) -> Judged:
        """Acceptance at every temperature, by logits and, where it can be asked, by vLLM."""
        counted = _counted(
            self.session, self.speaking, draft, self.held_out, self.settings, self.seed, self.folder, self.report, when
        )
        return Judged(self.by_logits(draft), counted)


def _counted(
    session: Session, speaking: Path, draft: Path, held_out: dict[float, list[Exchange]], settings: Draft, seed: int,
    folder: Path, report: Report, when: str,
) -> dict[float, Acceptance]:  # fmt: skip
    """vLLM's own counts by temperature; its CPU build garbles speculation above 0 and is asked at 0 alone."""
    return {
        heat: acceptance.measure(
            session, speaking, draft, texts, k=settings.speculative_tokens, longest=settings.answer_tokens,
            folder=folder / f"{when}-{heat:g}", report=report, what=f"acceptance on vLLM, {when}",
            temperature=heat, seed=seed, method=settings.kind,
        )
        for heat, texts in held_out.items()
        if heat == 0 or not vllm_environment.is_cpu_build()
    }  # fmt: skip


def _weights(target: Checkpoint, speaking: Path) -> str:
    return "as stored" if speaking == target.path else "dequantized, as a CPU runs them faster"


def _replay(
    session: Session, target: Checkpoint, training: Sequence[Exchange], settings: Draft, seed: int, initial: Path,
    report: Report,
) -> Callable[[int, Path], train.Material]:  # fmt: skip
    """Before an epoch: the draft's own answers to some prompts, read by the target (arXiv 2310.08461, section 3.1)."""

    def replay(epoch: int, weights: Path) -> train.Material:
        own = weights.with_suffix("")
        draft = own / "draft"
        if not (draft / "config.json").exists():
            initialize.write_draft(
                draft, open_checkpoint(initial).config, train.load_weights(weights), companions=initial
            )
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        prompts = [training[index].prompt for index in order[: max(round(settings.on_policy * len(training)), 1)]]
        answers = conversations.answers(
            session, draft, prompts, longest=settings.answer_tokens, seed=seed + epoch, folder=own, report=report,
            temperatures=(1.0,), what="the draft answers",
        )  # fmt: skip
        return train.Material(answers, _said(target, answers, settings, own / "said", report), [])

    return replay


def _apart(judged: dict[str, Judged]) -> list[str]:
    """Where vLLM's counters and the logits tell different accepted lengths, a sentence each."""
    lines = []
    for name, each in judged.items():
        for heat, counted in each.vllm.items():
            simulated = each.offline[heat].greedy
            if abs(counted.length - simulated.length) > _APART * max(simulated.error, 0.01):
                lines.append(
                    f"the draft's accepted length {name} training at temperature {heat:g} is {counted.length:.2f} on "
                    f"vLLM and {simulated.length:.2f} +- {simulated.error:.2f} by its logits: they should agree"
                )
    return lines
