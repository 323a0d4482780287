"""lm-eval tasks: the paired error against played-out samples; names and paths; the real lm-eval on the real vLLM."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.errors import QuantkitError
from quantkit.evaluate import tasks, tasks_worker
from quantkit.evaluate.tasks import Measure
from quantkit.progress import silent

TEXTS = [
    "The harbour of the town lies open to the west.",
    "When the wind blows from there no ship can leave it.",
    "Say in one sentence what a library is for.",
    "Name three colours and a thing that has each of them.",
]


def _measure(
    kind: Any, values: list[tuple[float, float]], *, higher: bool = True, error: float | None = None
) -> Measure:
    mean = sum(first for first, _ in values) / sum(second for _, second in values)
    value = {"mean": mean, "perplexity": math.exp(-mean), "bits": -mean / math.log(2), "other": mean}[kind]
    return Measure(
        task="t", metric="m", higher_is_better=higher, value=value, standard_error=error, kind=kind,
        documents=[str(number) for number in range(len(values))], values=[] if kind == "other" else values,
    )  # fmt: skip


def _right_and_wrong(generator: torch.Generator) -> tuple[Measure, Measure]:
    """Answers of two models to 300 questions, alike but for one in ten."""
    first = torch.rand(300, generator=generator) < 0.6
    second = torch.where(torch.rand(300, generator=generator) < 0.1, torch.rand(300, generator=generator) < 0.4, first)
    return tuple(_measure("mean", [(float(right), 1.0) for right in each]) for each in (first, second))  # type: ignore[return-value]


def _texts(generator: torch.Generator, kind: str) -> tuple[Measure, Measure]:
    """Log-probabilities and words of 100 texts of unequal length, the second model worse on all."""
    words = torch.randint(5, 60, (100,), generator=generator).double()
    nll = 3 + torch.randn(100, generator=generator).double()
    worse = nll + 0.3 + 0.1 * torch.randn(100, generator=generator).double()
    both = [list(zip((-each * words).tolist(), words.tolist(), strict=True)) for each in (nll, worse)]
    return tuple(_measure(kind, each, higher=False) for each in both)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "draw",
    [_right_and_wrong, lambda g: _texts(g, "perplexity"), lambda g: _texts(g, "bits")],
    ids=["accuracy", "perplexity", "bits"],
)
def test_standard_error_is_what_recovery_varies_by(draw: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    found = [tasks.recovery(*draw(generator)) for _ in range(800)]
    ratios = torch.tensor([each.value for each in found], dtype=torch.float64)
    errors = torch.tensor([each.standard_error for each in found], dtype=torch.float64)
    assert float(errors.mean()) == pytest.approx(float(ratios.std()), rel=0.1)
    assert 0.6 < float(ratios.mean()) < 1


def test_pairing_tells_more_than_two_errors() -> None:
    reference, candidate = _right_and_wrong(torch.Generator().manual_seed(3))
    alone = [math.sqrt(each.value * (1 - each.value) / 299) for each in (reference, candidate)]
    unpaired = [
        Measure.model_validate(each.model_dump() | {"kind": "other", "values": [], "standard_error": error})
        for each, error in zip((reference, candidate), alone, strict=True)
    ]
    paired_error, unpaired_error = (tasks.recovery(*pair).standard_error for pair in ((reference, candidate), unpaired))
    assert paired_error is not None and unpaired_error is not None
    assert unpaired_error > 2 * paired_error > 0
    expected = candidate.value / reference.value * math.hypot(alone[0] / reference.value, alone[1] / candidate.value)
    assert unpaired_error == pytest.approx(expected)


def test_recovery_of_nothing_is_none() -> None:
    some, none = _measure("mean", [(1.0, 1.0), (0.0, 1.0)]), _measure("mean", [(0.0, 1.0), (0.0, 1.0)])
    assert tasks.recovery(none, some) == (None, None)
    assert tasks.recovery(some, none).value == 0
    assert tasks.recovery(_measure("mean", [(1.0, 1.0)]), _measure("mean", [(1.0, 1.0)])) == (1, None)
    assert tasks.recovery(_measure("other", [(1.0, 1.0)]), _measure("other", [(1.0, 1.0)])) == (1, None)


def test_lower_is_better_is_turned_round() -> None:
    better, worse = (_measure("perplexity", [(-nll, 1.0), (-nll, 1.0)], higher=False) for nll in (1.0, 2.0))
    assert tasks.recovery(better, worse).value == pytest.approx(math.exp(-1))


def test_tasks_are_names_or_paths(tmp_path: Path) -> None:
    own = tasks.resolve(["everyday", str(tasks.own_tasks())])
    assert [source.name for source in own] == ["everyday", "endings", "sums"]
    assert not any(source.from_hub for source in own)
    theirs = tasks.resolve(["arc_easy", "mmlu", "ai2_arc", "mmlu_anatomy"])  # a task, a group, a tag, a quoted name
    assert all(source.path is None and source.from_hub for source in theirs)

    (tmp_path / "empty").mkdir()
    (tmp_path / "no-task.yaml").write_text("dataset_path: json\n")
    with pytest.raises(QuantkitError, match="is not the YAML of a task"):
        tasks.resolve([str(tmp_path / "no-task.yaml")])
    (tmp_path / "sums.yaml").write_text("task: sums\n")
    with pytest.raises(QuantkitError) as caught:
        tasks.resolve(["arc_esy", "nowhere/task.yaml", str(tmp_path / "empty"), "sums", str(tmp_path)])
    said = str(caught.value)
    assert "two tasks are named sums" in said
    assert "4 problems" in said and "arc_esy is no task" in said and "mean arc_easy" in said
    assert "everyday" in said and str(tasks.own_tasks()) in said and "nowhere/task.yaml holds no task" in said


def test_a_group_is_scored_over_all_samples() -> None:
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    three, one = _measure("mean", [(1.0, 1.0), (1.0, 1.0), (0.0, 1.0)]), _measure("mean", [(0.0, 1.0)])
    group = Group(name="both", aggregate_metric_list=[AggMetricConfig(metric="m")])
    (pooled,) = tasks_worker.pool([three, one], group)
    assert (pooled.task, pooled.value, len(pooled.documents)) == ("both", 0.5, 4)
    alike = Group(name="both", aggregate_metric_list=[AggMetricConfig(metric="m", weight_by_size=False)])
    assert tasks_worker.pool([three, one], alike) == [three, one]


def test_digest_is_of_the_yaml_what_it_includes_and_its_data(tmp_path: Path) -> None:
    choice = _write_tasks(tmp_path)[0]
    (tmp_path / "more.yaml").write_text("include: choice.yaml\ntask: more\ndoc_to_text: !function none.such\n")
    digests = {name: [] for name in ("choice.yaml", "more.yaml")}
    for change in (choice, tmp_path / "choice.jsonl"):
        for name, seen in digests.items():
            seen.append(tasks.resolve([str(tmp_path / name)])[0].digest)
        change.write_text(change.read_text() + "\n")
    for name, seen in digests.items():
        seen.append(tasks.resolve([str(tmp_path / name)])[0].digest)
    assert len(set(digests["choice.yaml"])) == 3
    assert len(set(digests["more.yaml"])) == 2  # an empty line of what it includes says nothing

    (tmp_path / "choice.jsonl").unlink()
    with pytest.raises(QuantkitError, match=r"task more: .*choice\.jsonl is not there"):
        tasks.resolve([str(tmp_path / "more.yaml")])


def test_own_tasks_are_whole() -> None:
    for name in ("everyday", "sums"):
        lines = (tasks.own_tasks() / f"{name}.jsonl").read_text().splitlines()
        for line in lines:
            item = json.loads(line)
            assert len(set(item["choices"])) == 4 and item["answer"] in range(4)
        assert len({json.loads(line)["text"] for line in lines}) == len(lines)
        places = [json.loads(line)["answer"] for line in lines]
        assert all(35 < places.count(place) < 70 for place in range(4))  # no place is right more often


def _write_tasks(folder: Path) -> list[Path]:
    """A task of each kind of question: which answer, how likely a text, what to write."""
    choices = [
        {"text": text, "choices": ["a ship", "the west", "ten", "open"], "answer": n % 4}
        for n, text in enumerate(TEXTS * 6)
    ]
    rows = {
        "choice": choices,
        "rolling": [{"text": text} for text in TEXTS],
        "writing": [{"text": text} for text in TEXTS],
    }
    asks = {
        "choice": 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n',
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n',
        "writing": 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{text}}"\n'
        "generation_kwargs: {until: ['zzz'], max_gen_toks: 4}\n",
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics = {
            "choice": ("acc", "brier_score"),
            "rolling": ("word_perplexity", "bits_per_byte"),
            "writing": ("exact_match",),
        }
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
            f"test_split: test\n{asks[name]}metric_list: [{', '.join(f'{{metric: {m}}}' for m in metrics[name])}]\n"
        )
    return [folder / f"{name}.yaml" for name in rows]


@pytest.mark.vllm
def test_the_real_lm_eval_on_the_real_vllm(
    tiny_llama: Path, make_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_llama(tmp_path / "other", seed=5)
    (tmp_path / "tasks").mkdir()
    choice, rolling, writing = _write_tasks(tmp_path / "tasks")
    folder = tmp_path / "work"
    first = tasks.run(
        tiny_llama, {"same": tiny_llama}, [str(choice)], folder=folder, limit=None, seed=0, report=silent
    )  # fmt: skip
    assert {row["metric"] for row in first["same"]} == {"acc", "brier_score"}
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("choice-*.json")}
    assert len(kept) == 1  # the same model, the same question: asked once

    everything = [str(path) for path in (choice, rolling, writing)]
    names = {"same": tiny_llama, "other": other}
    rows = tasks.run(tiny_llama, names, everything, folder=folder, limit=None, seed=0, report=silent)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert rows["same"][:2] == first["same"]
    assert [row["task"] for row in rows["same"]] == ["choice", "choice", "rolling", "rolling", "writing"]
    for row in rows["same"][:4]:
        assert row["recovery"] == 1 and row["standard_error"] == (None if row["metric"] == "brier_score" else 0)
    assert rows["same"][4]["recovery"] is None  # nothing right, nothing to keep of it
    by_metric = {row["metric"]: row for row in rows["other"]}
    assert by_metric["acc"]["samples"] == 24 and by_metric["word_perplexity"]["samples"] == 4
    for name in ("reference", "candidate"):
        expected = _word_perplexity(tiny_llama if name == "reference" else other)
        assert math.log(by_metric["word_perplexity"][name]) == pytest.approx(math.log(expected), rel=0.02)
    inverse = by_metric["bits_per_byte"]["reference"] / by_metric["bits_per_byte"]["candidate"]
    assert by_metric["bits_per_byte"]["recovery"] == pytest.approx(inverse)
    assert by_metric["bits_per_byte"]["standard_error"] > 0

    monkeypatch.setattr(tasks, "_ask", lambda *_: pytest.fail("all of it is known"))
    again = tasks.run(tiny_llama, names, everything, folder=folder, limit=None, seed=0, report=silent)
    assert again == rows


def _word_perplexity(checkpoint: Path) -> float:
    """exp of the texts' nll, the first token after the prefix token, over their words: by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    nll, words = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        nll -= float(logprobs.gather(-1, ids[0, 1:, None]).sum())
        words += len(text.split())
    return math.exp(nll / words)


@pytest.mark.vllm
def test_data_that_are_not_to_be_had_are_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "hub.yaml"
    path.write_text("task: from_hub\ndataset_path: quantkit-none/no-such-set\noutput_type: loglikelihood_rolling\n")
    with pytest.raises(QuantkitError) as caught:
        tasks.run(tiny_llama, {}, [str(path)], folder=tmp_path / "work", limit=1, seed=0, report=silent)
    said = str(caught.value)
    assert "task from_hub: its data could not be fetched" in said and "HF_HOME" in said and "\n" not in said
