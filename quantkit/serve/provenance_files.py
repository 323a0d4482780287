"""Where a bundle comes from, for people and for tools: a model card, a CycloneDX ML-BOM and SLSA provenance.

All of it is a view of bundle.json; nothing is measured or looked up here. Same record, same bytes: no dates but those
of the stages, and a serial number that is made from the digests.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import provenance
from quantkit.serve import rendering
from quantkit.serve.settings import DRAFT_DIR, TARGET_DIR, ServeSettings
from quantkit.serve.verdict import Check, of_problems

CARD = "provenance/model-card.md"
BOM = "provenance/bom.cdx.json"
SLSA = "provenance/slsa.intoto.json"

# Names, not addresses: SLSA asks for a URI of whoever built and of the kind of build.
_BUILD_TYPE = "urn:x-quantkit:bundle:1"
_BUILDER = "urn:x-quantkit:builder:1"


class Figure(NamedTuple):
    """One figure of the evaluation that the bundle carries; `on` is the set that was scored, or a task."""

    metric: str
    on: str
    kv_cache: str
    value: float
    interval: tuple[float, float] | None = None
    reference: float | None = None  # the same of the original, where it has one


def files(settings: ServeSettings, record: Mapping[str, Any]) -> dict[str, str]:
    """Path in the bundle -> text."""
    return {
        CARD: rendering.render(
            "model_card.md.j2", bundle=record, settings=settings, figures=figures(record), datasets=_datasets(record),
            licences=_licences(record), json=json.dumps,
        ),
        BOM: _json(_bom(settings, record)),
        SLSA: _json(_statement(record)),
    }  # fmt: skip


def checks(bundle: Path) -> list[Check]:
    """Whether the provenance speaks of the very checkpoints in this bundle."""
    name = "provenance agrees with bundle.json"
    try:
        files_of = json.loads((bundle / "bundle.json").read_bytes())["files"]
        subjects = {
            each["name"]: each["digest"]["sha256"] for each in json.loads((bundle / SLSA).read_bytes())["subject"]
        }
        parts = [part for model in _models(json.loads((bundle / BOM).read_bytes())) for part in model["components"]]
        listed = {part["name"]: part["hashes"][0]["content"] for part in parts}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return [Check(name=name, passed=False, detail=f"it cannot be read ({error!r}): build the bundle again")]
    own = {file: found["sha256"] for file, found in files_of.items()}
    in_models = {file: sha256 for file, sha256 in own.items() if file.startswith((f"{TARGET_DIR}/", f"{DRAFT_DIR}/"))}
    problems = [] if subjects == own else [f"{SLSA} names other files"]
    problems += [] if listed == in_models else [f"{BOM} names other files"]
    return [of_problems(name, problems, good=f"{len(own)} files, the same in each")]


def figures(record: Mapping[str, Any]) -> list[Figure]:
    """What the carried evaluation says of this target; of other candidates in the same report nothing is taken."""
    report = record["measured"].get("report", {})
    digest, found = f"sha256:{record['digests'][TARGET_DIR]}", []
    for candidate in report.get("candidates", []):
        if candidate["digest"] != digest:
            continue
        cache = candidate["kv_cache"]
        for on, seen in candidate["on"].items():
            perplexity = seen["perplexity"]
            found.append(Figure("perplexity", on, cache, perplexity["candidate"], None, perplexity["reference"]))
            for metric in ("drift", "kl_nats", "top1_agreement"):
                interval = seen[metric]["interval"]
                found.append(Figure(metric, on, cache, seen[metric]["value"], interval and tuple(interval)))
        for task in candidate["tasks"]:
            found.append(Figure(task["metric"], task["task"], cache, task["candidate"], None, task["reference"]))
    return found


def _datasets(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what for, source, SHA-256 of it) of every text that shaped or judged a part of the bundle."""
    asked = (
        ("calibration of the target", "target", ("calibration", "text")),
        ("prompts of the draft's training", "draft", ("prompts",)),
        ("evaluation", "report", ("text",)),
    )
    found = []
    for use, stage, keys in asked:
        value: Any = record["stages"].get(stage, {}).get("settings", {})
        for key in keys:
            value = value.get(key, {})
        found += [(use, source, digest) for source, digest in value.items()]
    return found


def _licences(record: Mapping[str, Any]) -> list[str]:
    return [name for name in record["files"] if Path(name).name.startswith(("LICENSE", "LICENCE", "USE_POLICY"))]


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _statement(record: Mapping[str, Any]) -> dict[str, Any]:
    """An in-toto Statement v1 with SLSA provenance v1: which commands, with which settings, on which inputs.

    The digest of a directory is that of the list of its files' names and digests (`quantkit.artifacts.digest`).
    """
    stages = record["stages"]
    dependencies = [
        {"name": f"{stage}: {name}", "digest": {"sha256": digest}}
        for stage, inputs in record["inputs"].items()
        for name, digest in inputs.items()
    ]
    dependencies += [
        {"name": f"{use}: {source}", "digest": {"sha256": digest}} for use, source, digest in _datasets(record)
    ]
    commands = {name: {"command": stage["command"], "settings": stage["settings"]} for name, stage in stages.items()}
    commands["bundle"] = {"command": "quantkit serve bundle", "settings": record["settings"]}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": name, "digest": {"sha256": found["sha256"]}} for name, found in sorted(record["files"].items())
        ],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": commands,
                "internalParameters": {"versions": {name: stage["versions"] for name, stage in stages.items()}},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": _BUILDER, "version": record["versions"]},
                "metadata": {"finishedOn": max(stage["finished"] for stage in stages.values())} if stages else {},
            },
        },
    }


def _bom(settings: ServeSettings, record: Mapping[str, Any]) -> dict[str, Any]:
    """A CycloneDX 1.6 bill of materials: the target as its subject, the draft and the engine beside it."""
    named = record["architecture"].get("architectures") or ["unknown"]
    target = _model(record, TARGET_DIR, settings.served_model_name) | {
        "modelCard": {
            "modelParameters": {
                "task": "text-generation", "architectureFamily": "transformer", "modelArchitecture": named[0],
                "datasets": [_dataset(*each) for each in _datasets(record) if "draft" not in each[0]],
            },
            "quantitativeAnalysis": {"performanceMetrics": [_metric(figure) for figure in figures(record)]},
            "considerations": {"technicalLimitations": list(record["warnings"])},
        },
    }  # fmt: skip
    base = record["pin"]["base"]
    if base:
        target["pedigree"] = {
            "ancestors": [
                {"type": "machine-learning-model", "name": "the checkpoint it was quantized from",
                 "properties": [{"name": "quantkit:digest", "value": base}]}
            ]
        }  # fmt: skip
    components = [
        {"type": "library", "bom-ref": f"pkg:pypi/{name}@{version}", "name": name, "version": version,
         "purl": f"pkg:pypi/{name}@{version}"}
        for name, version in sorted(record["versions"].items()) if name != "python"
    ]  # fmt: skip
    depends = [component["bom-ref"] for component in components]
    if record["pin"]["draft"]:
        draft = _model(record, DRAFT_DIR, f"{settings.served_model_name} draft") | {
            "modelCard": {
                "modelParameters": {
                    "task": "speculative drafting",
                    "datasets": [_dataset(*each) for each in _datasets(record) if "draft" in each[0]],
                },
                "quantitativeAnalysis": {"performanceMetrics": _accepted(record)},
            },
        }  # fmt: skip
        components.append(draft)
        depends.append(DRAFT_DIR)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, provenance.digest_of(record))}",
        "version": 1,
        "metadata": {"component": target},
        "components": components,
        "dependencies": [{"ref": TARGET_DIR, "dependsOn": depends}],
    }


def _model(record: Mapping[str, Any], role: str, name: str) -> dict[str, Any]:
    """The files of a checkpoint as parts of one component."""
    return {
        "type": "machine-learning-model",
        "bom-ref": role,
        "name": name,
        "properties": [{"name": "quantkit:digest", "value": record["digests"][role]}],
        "components": [
            {"type": "file", "name": file, "hashes": [{"alg": "SHA-256", "content": found["sha256"]}]}
            for file, found in sorted(record["files"].items())
            if file.startswith(f"{role}/")
        ],
    }


def _models(bom: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield bom["metadata"]["component"]
    yield from (each for each in bom["components"] if each["type"] == "machine-learning-model")


def _dataset(use: str, source: str, digest: str) -> dict[str, Any]:
    contents = {"properties": [{"name": "quantkit:sha256", "value": digest}]}
    return {"type": "dataset", "name": source, "description": use, "contents": contents}


def _metric(figure: Figure) -> dict[str, Any]:
    metric: dict[str, Any] = {
        "type": figure.metric, "value": f"{figure.value:.6g}", "slice": f"{figure.on}, KV cache {figure.kv_cache}",
    }  # fmt: skip
    if figure.interval:
        low, high = figure.interval
        metric["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
    return metric


def _accepted(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Accepted length by number of draft tokens, as far as it was counted; every plan has the same counts."""
    for plan in record["speculation"]["plans"].values():
        counted = plan["accepted_length"][: plan["measured_positions"]]
        return [
            {"type": "accepted length", "value": f"{length:.6g}", "slice": f"{number} draft tokens, temperature 0"}
            for number, length in enumerate(counted, 1)
        ]
    return []
