"""Where a bundle comes from, read by the libraries of those who wrote the formats."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard

from quantkit import artifacts
from quantkit.cli import main
from quantkit.serve import bundle as bundles
from quantkit.serve import provenance_files
from quantkit.serve.settings import ServeSettings

SETTINGS = ServeSettings(
    served_model_name="tiny", max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=1024, num_speculative_tokens=3
)
BASE, TEXT, HELD_OUT, CHATS = (letter * 64 for letter in "abcd")


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of stages that say where they come from."""
    folder = tmp_path_factory.mktemp("provenance")

    def stage(
        name: str, kind: artifacts.Kind, source: Path | None, *, inputs: dict[str, str], settings: dict[str, Any],
        results: dict[str, Any],
    ) -> Path:  # fmt: skip
        with artifacts.making(folder / name, kind, inputs=inputs, settings=settings) as work:
            if source:
                shutil.copytree(source, work.out, dirs_exist_ok=True)
            else:
                (work.out / "report.html").write_text("<p>drift</p>")
            work.results.update(results)
        return folder / name

    target = stage(
        "target", "quantized", tiny_llama, inputs={"checkpoint": BASE},
        settings={"quantize": {"bits": 4}, "calibration": {"text": {"prose.txt": TEXT}, "samples": 8}, "seed": 7},
        results={"method": "gptq"},
    )  # fmt: skip
    digest = artifacts.digest(target)
    draft = stage(
        "draft", "draft", tiny_llama, inputs={"target": digest},
        settings={"draft": {"epochs": 3}, "prompts": {"self:8": CHATS}, "seed": 7}, results={},
    )  # fmt: skip
    seen = {
        "perplexity": {"reference": 10.0, "candidate": 10.5}, "drift": {"value": 0.05, "interval": [0.04, 0.06]},
        "kl_nats": {"value": 0.02, "interval": None}, "top1_agreement": {"value": 0.9, "interval": None},
    }  # fmt: skip
    judged = {"name": "target", "kv_cache": "auto", "on": {"text": seen}, "tasks": []}
    results = {
        "verdict": "passed", "profile": "default", "note": "",
        "candidates": [judged | {"digest": f"sha256:{digest}"}, judged | {"digest": "sha256:another"}],
    }  # fmt: skip
    report = stage(
        "report", "report", None, inputs={"candidate": digest, "reference": BASE},
        settings={"text": {"held-out.txt": HELD_OUT}, "seed": 7}, results=results,
    )  # fmt: skip
    with artifacts.making(folder / "bundle", "bundle", inputs={}, settings={}) as work:
        bundles.build(work, target=target, draft=draft, report=report, settings=SETTINGS, sources={})
    return folder / "bundle"


def test_bundle_json_says_what_everything_was_made_from(made: Path) -> None:
    record = bundles.read_bundle(made)
    assert record["pin"]["base"] == BASE and record["pin"]["draft_trained_for"] == record["pin"]["target"]
    assert record["stages"]["target"]["settings"]["calibration"]["text"] == {"prose.txt": TEXT}
    assert {stage["settings"]["seed"] for stage in record["stages"].values()} == {7}
    assert all(stage["versions"]["torch"] for stage in record["stages"].values())
    assert record["files"]["target/model.safetensors"]["sha256"] in (made / "SHA256SUMS").read_text()
    assert record["warnings"] == []


def test_the_bill_of_materials_is_valid_and_names_every_file(made: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (made / provenance_files.BOM).read_text()
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    bom = json.loads(text)
    target = bom["metadata"]["component"]
    assert target["type"] == "machine-learning-model" and target["modelCard"]["modelParameters"]["datasets"]
    assert target["pedigree"]["ancestors"][0]["properties"][0]["value"] == BASE
    metrics = {each["type"]: each for each in target["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["drift"]["value"] == "0.05"
    assert metrics["drift"]["confidenceInterval"] == {"lowerBound": "0.04", "upperBound": "0.06"}
    bom["metadata"]["component"]["modelCard"]["weather"] = "fine"
    assert validator.validate_str(json.dumps(bom)) is not None


def test_the_provenance_is_slsa_in_an_in_toto_statement(made: Path) -> None:
    pytest.importorskip("in_toto_attestation", reason="comes with quantkit[sign]")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    text = (made / provenance_files.SLSA).read_text()
    statement = json_format.Parse(text, statement_pb2.Statement())  # refuses a field that it does not know
    Statement.copy_from_pb(statement).validate()
    predicate = json.loads(text)["predicate"]
    json_format.ParseDict(predicate, provenance_pb2.Provenance())
    definition = predicate["buildDefinition"]
    assert definition["externalParameters"]["target"]["settings"]["seed"] == 7
    digests = {each["name"]: each["digest"]["sha256"] for each in definition["resolvedDependencies"]}
    assert digests["target: checkpoint"] == BASE and digests["calibration of the target: prose.txt"] == TEXT
    assert digests["evaluation: held-out.txt"] == HELD_OUT


def test_the_model_card_has_the_figures_of_this_target_alone(made: Path) -> None:
    text = (made / provenance_files.CARD).read_text()
    card = ModelCard(text)
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert found == {"perplexity": 10.5, "drift": 0.05, "kl_nats": 0.02, "top1_agreement": 0.9}
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "text-generation"
    assert text.count("| perplexity |") == 1 and BASE in text and "verdict: passed" in text


def test_provenance_of_other_files_is_found(made: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    assert provenance_files.checks(bundle)[0].passed
    path = bundle / provenance_files.SLSA
    statement = json.loads(path.read_text())
    statement["subject"][0]["digest"]["sha256"] = BASE
    path.write_text(json.dumps(statement))
    assert provenance_files.checks(bundle)[0].detail == f"{provenance_files.SLSA} names other files"
    path.unlink()
    assert "cannot be read" in provenance_files.checks(bundle)[0].detail


def test_inspect_shows_a_bundle_in_a_screenful(made: Path) -> None:
    done = CliRunner().invoke(main, ["inspect", str(made)], env={"COLUMNS": "120"})
    assert done.exit_code == 0 and done.output.count("\n") < 25, done.output
    for words in (
        "passed by the profile default; drift on text +5.00%", f"checkpoint {BASE[:16]}", "trained for this target",
        "1024 bytes a token and rank, 0.001 GiB for one sequence of 1024 tokens", "signature",
    ):  # fmt: skip
        assert words in done.output, done.output
