"""The serving bundle: target, draft, vLLM settings, evidence and digests in one folder that can be moved."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from quantkit import artifacts, checkpoint, foreign, provenance
from quantkit.capacity import sizing
from quantkit.errors import QuantkitError, raise_all, refusing
from quantkit.kv_scheme import KINDS, has_kv_scheme, kv_scale_problems
from quantkit.serve import (
    asking,
    compose,
    kubernetes,
    observability,
    picture,
    provenance_files,
    ray_serve,
    rendering,
)
from quantkit.serve import settings as flags
from quantkit.serve.record import Record
from quantkit.serve.settings import CONFIG_FILES, DRAFT_DIR, TARGET_DIR, ServeSettings
from quantkit.speculation import PLACES, RESULTS_KEY, STANDARD_ERRORS, Decision, Plan, Profile, drafted
from quantkit.speculation import read as read_plans

REPORT_DIR = "report"
PICTURE = "speculation.svg"
BUNDLE_JSON = "bundle.json"
SUMS_NAME = "SHA256SUMS"

# What else is written, each from the settings and bundle.json, and checked by itself.
ROOMS = (asking, compose, observability, kubernetes, ray_serve, provenance_files)

# Formats that run code when they are loaded. vLLM would read none of them, but the next tool might.
_CODE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")
_CARRIED_SUFFIXES = (".json", ".jinja", ".model")
_CARRIED_NAMES = ("merges.txt", "vocab.txt")
_LICENCE_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


class Work(Protocol):
    """The part of `artifacts.Work` that the bundle needs: where to write, and what to say in the manifest."""

    out: Path
    results: dict[str, Any]


def build(
    work: Work,
    *,
    target: Path,
    draft: Path | None,
    report: Path | None,
    settings: ServeSettings,
    sources: Mapping[str, str],
    decisions: Mapping[Profile, Decision] | None = None,
) -> None:
    """Write the bundle into `work.out`. Everything but the digests of the files is checked before the first is written.

    Weights are hard links where the file system allows it: a bundle costs no second copy.

    Args:
        target: checkpoint directory that is served.
        draft: the draft's, or None to serve without speculation. Where no profile of the settings speculates it is left
            out, and what its plan says is kept.
        report: evaluation report directory, whose files are carried as evidence.
        sources: setting name -> where its value came from, for the comments in the YAML files.
        decisions: why each profile speculates or not, for the README.

    Raises:
        QuantkitError: all that keeps vLLM from serving this pair with these settings.
    """
    planned = artifacts.read_manifest(draft) if draft else None
    plans = read_plans(planned.results) if planned else {}
    draft = draft if settings.speculates or not decisions else None
    raise_all(_all_problems(target, draft, report, settings))
    _empty(work.out)
    left_out = {TARGET_DIR: _carry_checkpoint(target, work.out / TARGET_DIR)}
    if draft:
        left_out[DRAFT_DIR] = _carry_checkpoint(draft, work.out / DRAFT_DIR)
        kind = sizing.speculative_method(sizing.read_config(draft))
        settings = settings.model_copy(update={"speculative_method": kind})
    if report:
        _carry_report(report, work.out / REPORT_DIR)
    carried = artifacts.record_files(work.out)
    raise_all(_changed(carried, {TARGET_DIR: target, DRAFT_DIR: draft, REPORT_DIR: report}))
    for profile in CONFIG_FILES:
        path = work.out / CONFIG_FILES[profile]
        path.parent.mkdir(exist_ok=True)
        artifacts.write_text(path, flags.to_yaml(settings, profile, sources=sources))
    if plans:
        artifacts.write_text(work.out / PICTURE, picture.speedups(list(plans.values())))
    record = _record(target, draft, report, settings, sources, left_out) | {
        "speculation": {
            "decisions": {profile: decision._asdict() for profile, decision in (decisions or {}).items()},
            "plans": {profile: plan.model_dump(mode="json") for profile, plan in plans.items()},
        },
        "files": {name: found.model_dump() for name, found in carried.items()},
    }
    for room in ROOMS:
        for name, text in room.files(settings, record).items():
            (work.out / name).parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_text(work.out / name, text)
    artifacts.write_json(work.out / BUNDLE_JSON, record)
    artifacts.write_text(work.out / "README.md", render_readme(record, settings, plans))
    artifacts.write_text(work.out / SUMS_NAME, sums_text(work.out, carried))
    work.results.update(
        measured=record["measured"], warnings=record["warnings"],
        speculation={profile: decision.why for profile, decision in (decisions or {}).items()},
    )  # fmt: skip


def _changed(carried: Mapping[str, artifacts.FileRecord], parts: Mapping[str, Path | None]) -> list[str]:
    """The carried files that are not those that a part's manifest vouches for: what was measured was not these."""
    problems = []
    for role, path in parts.items():
        manifest = artifacts.read_manifest(path) if path else None
        for name, record in (manifest.files if manifest else {}).items():
            found = carried.get(f"{role}/{name}")
            if found is not None and found.sha256 != record.sha256:
                problems.append(f"{role} {path}: {name} has changed since its manifest was written: make it again")
    return problems


def checkpoint_problems(folder: Path, role: str) -> list[str]:
    """Why a checkpoint directory must not go into a bundle as it is; empty when it may."""
    if not folder.is_dir():
        return [f"{role} {folder} is not a directory: give a checkpoint directory"]
    found = []
    for path in _files(folder):
        name = path.relative_to(folder)
        if path.suffix in _CODE_SUFFIXES:
            found.append(
                f"{role} {name} can run code when loaded: keep safetensors only (convert, then remove the file)"
            )
        if not path.resolve().is_relative_to(folder.resolve()):
            found.append(f"{role} {name} is a link out of {folder}: copy the checkpoint with cp -rL and give the copy")
    try:
        config = sizing.read_config(folder)
        sizing.weight_bytes(folder)
        names = [name for path in sizing.safetensors_files(folder) for name in sizing.tensor_shapes(path)]
        found += [f"{role} {problem}" for problem in kv_scale_problems(config, names)]
        found += [f"{role}: {problem}" for problem in checkpoint.code_problems(folder)]
    except QuantkitError as error:
        found.append(f"{role}: {error}")
    if not (folder / "tokenizer.json").is_file():
        found.append(f"{role} {folder} has no tokenizer.json: save a fast tokenizer into it")
    else:
        with refusing(f"{role} {folder / 'tokenizer.json'} cannot be read", "get it again"):
            found += _beyond_embedding(folder, role)
    return found


def _beyond_embedding(checkpoint: Path, role: str) -> list[str]:
    """Tokens whose id has no row in the embedding: a client that writes one ends the server, or reads beyond it."""
    rows = _json(checkpoint / "config.json").get("vocab_size")
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab(with_added_tokens=True)
    beyond = sorted(token for token, number in ids.items() if isinstance(rows, int) and number >= rows)
    if not beyond:
        return []
    return [
        f"{role} tokenizer.json has {len(beyond)} tokens ({', '.join(map(repr, beyond[:3]))}) beyond the {rows} rows "
        "of the embedding: remove them from it"
    ]


def tokenizer_problems(target: Path, draft: Path) -> list[str]:
    """How the tokenizers of target and draft differ; empty when every token has the same id in both."""
    pair = [directory / "tokenizer.json" for directory in (target, draft)]
    if not all(path.is_file() for path in pair):
        return []  # said by checkpoint_problems
    if pair[0].read_bytes() == pair[1].read_bytes():
        return []
    # The bytes differ for many a harmless reason (truncation left set, another version): the ids are what counts.
    with refusing("the tokenizers of target and draft cannot be compared", "get their tokenizer.json again"):
        ids_target, ids_draft = (Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True) for path in pair)
    differing = sorted(
        token for token in ids_target.keys() | ids_draft.keys() if ids_target.get(token) != ids_draft.get(token)
    )
    if not differing:
        return []
    return [
        f"target and draft give {len(differing)} tokens different ids ({', '.join(map(repr, differing[:3]))}, ...): "
        "use a draft of the same family"
    ]


def sums_text(bundle: Path, known: Mapping[str, artifacts.FileRecord]) -> str:
    """SHA256SUMS of a bundle, as `sha256sum -c` reads it; the manifest, written after it, is not in it.

    known: files that need not be read again.
    """
    records = artifacts.record_files(bundle, known)
    return "".join(f"{record.sha256}  {name}\n" for name, record in sorted(records.items()) if name != SUMS_NAME)


def render_readme(record: Mapping[str, Any], settings: ServeSettings, plans: Mapping[Profile, Plan]) -> str:
    """The bundle's README.md."""
    measured = {stage: list(_flat(results)) for stage, results in record["measured"].items()}
    return rendering.render(
        "bundle_readme.md.j2", bundle=record, settings=settings, configs=CONFIG_FILES,
        measured={k: v for k, v in measured.items() if v}, plans=plans, places=PLACES, errors=STANDARD_ERRORS,
        drafted=drafted, cluster=kubernetes.names_of(settings), nodes=kubernetes.nodes(settings),
        vllm_floor=compose.VLLM_FLOOR,
    )  # fmt: skip


def _all_problems(target: Path, draft: Path | None, report: Path | None, settings: ServeSettings) -> list[str]:
    found = checkpoint_problems(target, "target")
    if draft:
        found += checkpoint_problems(draft, "draft") + tokenizer_problems(target, draft)
    if report and not report.is_dir():
        found.append(f"report {report} is not a directory: give the output directory of an evaluation")
    try:
        target_config = sizing.read_config(target)
        draft_config = sizing.read_config(draft) if draft else None
    except QuantkitError:
        return found  # said by checkpoint_problems
    found += flags.problems(settings, target_config, draft_config)
    if draft and "min_p" in _json(target / "generation_config.json"):
        found.append("target generation_config.json sets min_p, which vLLM rejects with a draft: remove it there")
    return found


def _carry_checkpoint(source: Path, destination: Path) -> list[str]:
    """Link what vLLM reads into the bundle; returns the names of what was left out."""
    weights = {path.name for path in sizing.safetensors_files(source)}
    left_out = []
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        carried = name in weights or (
            "/" not in name
            and name != artifacts.MANIFEST_NAME
            and (path.suffix in _CARRIED_SUFFIXES or name in _CARRIED_NAMES or name.startswith(_LICENCE_NAMES))
        )
        if carried:
            # link(2) does not follow a symlink on Linux: without resolve() the bundle would hold the link itself.
            artifacts.link_or_copy(path.resolve(), destination / name)
        elif name != artifacts.MANIFEST_NAME:
            left_out.append(name)
    return left_out


def _carry_report(source: Path, destination: Path) -> None:
    for path in _files(source):
        name = path.relative_to(source)
        if name.as_posix() != artifacts.MANIFEST_NAME and artifacts.PARTIAL_NAME not in name.parts:
            artifacts.link_or_copy(path.resolve(), destination / name)


def _record(
    target: Path,
    draft: Path | None,
    report: Path | None,
    settings: ServeSettings,
    sources: Mapping[str, str],
    left_out: Mapping[str, list[str]],
) -> dict[str, Any]:
    """What bundle.json says: what is inside, what it was made from, what was measured, what to be wary of."""
    stages = {TARGET_DIR: target, DRAFT_DIR: draft, REPORT_DIR: report}
    present = {name: path for name, path in stages.items() if path is not None}
    manifests = {name: artifacts.read_manifest(path) for name, path in present.items()}
    digests = {name: artifacts.digest(path) for name, path in present.items()}
    config = sizing.read_config(target)
    draft_config = sizing.read_config(draft) if draft else None
    warnings = flags.warnings(settings, config, draft_config)
    if not has_chat_template(target):
        warnings.append("The target has no chat template: ask /v1/completions, as /v1/chat/completions answers 400.")
    draft_manifest = manifests.get(DRAFT_DIR)
    trained_for = draft_manifest.inputs.get("target") if draft_manifest else None
    target_manifest, judged = manifests[TARGET_DIR], manifests.get(REPORT_DIR)
    if trained_for and trained_for != digests[TARGET_DIR]:
        warnings.append("The draft was trained for another target: expect a lower acceptance than was measured then.")
    if judged and digests[TARGET_DIR] not in judged.inputs.values():
        warnings.append("The report judges another checkpoint than this target: it says nothing of this bundle.")
    return {
        "format": 1,
        "digests": digests,
        "inputs": {name: manifest.inputs for name, manifest in manifests.items() if manifest},
        "stages": {name: _stage_record(manifest) for name, manifest in manifests.items() if manifest},
        "pin": {
            "base": target_manifest.inputs.get("checkpoint") if target_manifest else None,
            "target": digests[TARGET_DIR],
            "draft": digests.get(DRAFT_DIR),
            "draft_trained_for": trained_for,
        },
        "architecture": {key: config[key] for key in _ARCHITECTURE if key in config},
        "quantization_config": config.get("quantization_config"),
        "draft_quantization_config": (draft_config or {}).get("quantization_config"),
        "kv_cache": _kv_record(settings, config, draft_config),
        "settings": settings.model_dump(),
        "sources": {name: sources.get(name, "default") for name in ServeSettings.model_fields},
        "measured": {
            # a draft's plans stand by themselves
            name: {key: value for key, value in manifest.results.items() if key != RESULTS_KEY}
            for name, manifest in manifests.items()
            if manifest
        },
        "warnings": warnings,
        "left_out": {name: names for name, names in left_out.items() if names},
        "versions": provenance.versions(),
        "engine": "vllm 0.32.0",
    }


_COMMANDS = {"quantized": "quantkit quantize", "draft": "quantkit train-draft", "report": "quantkit eval"}


def _stage_record(manifest: artifacts.Manifest) -> dict[str, Any]:
    """How a part of the bundle was made: the command, all its settings (seed, digests of texts), with what, where."""
    return {
        "command": _COMMANDS.get(manifest.kind, "quantkit"), "settings": manifest.settings,
        "versions": manifest.versions, "machine": manifest.machine, "finished": manifest.finished,
    }  # fmt: skip


_ARCHITECTURE = ("architectures", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "vocab_size", "max_position_embeddings")  # fmt: skip


def _kv_record(
    settings: ServeSettings, target_config: Mapping[str, Any], draft_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Bytes of KV cache a token and a full sequence take on one rank of the GPU profile."""
    dtype = sizing.kv_dtype(target_config, settings.kv_cache_dtype, settings.dtype)
    per_token = {
        role: sizing.kv_bytes_per_token(
            config, dtype, settings.tensor_parallel_size, skip_layers=settings.kv_cache_dtype_skip_layers
        )
        for role, config in (("target", target_config), ("draft", draft_config))
        if config is not None
    }
    return {
        "dtype": dtype,
        "scales": _scales(settings, dtype, target_config),
        "layers_at_16_bits": list(settings.kv_cache_dtype_skip_layers),
        "bytes_per_token": per_token,
        "bytes_per_sequence": sum(per_token.values()) * settings.max_model_len,
    }


def _scales(settings: ServeSettings, dtype: str, config: Mapping[str, Any]) -> str | None:
    """Where an FP8 cache's scales come from."""
    if not KINDS[dtype].scales:
        return None
    if has_kv_scheme(config):
        return "calibrated, of the checkpoint"
    return "1.0, uncalibrated as asked for" if settings.uncalibrated_kv_cache else "1.0, uncalibrated"


def _files(directory: Path) -> list[Path]:
    """Every file below a directory, in one order; what is still being made is no part of it."""
    return sorted(
        path
        for path in directory.rglob("*")
        if not path.is_dir() and artifacts.PARTIAL_NAME not in path.relative_to(directory).parts
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return foreign.json_object(path, remedy="write the checkpoint again")
    except FileNotFoundError:
        return {}


def _empty(out: Path) -> None:
    """Remove what an interrupted try left: a file that is no longer wanted would end up in the sums."""
    for path in sorted(out.rglob("*"), reverse=True):
        if artifacts.PARTIAL_NAME in path.relative_to(out).parts:
            continue
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested results as (dotted name, printed value); long lists are left to bundle.json."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, float):
        yield name, f"{value:.4g}"
    elif isinstance(value, str | int | None):
        yield name, str(value)
    elif isinstance(value, Iterable):
        items = list(value)
        if len(items) <= 8 and all(isinstance(item, str | int | float) for item in items):
            yield name, ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in items)


def read_bundle(bundle: Path) -> dict[str, Any]:
    """bundle.json of a bundle, of the shape that `Record` has.

    Raises:
        QuantkitError: the folder holds none, or something else of that name.
    """
    path, remedy = bundle / BUNDLE_JSON, "build the bundle again"
    try:
        found = foreign.json_object(path, remedy=remedy, within=bundle)
    except FileNotFoundError:
        raise QuantkitError(
            f"{bundle} holds no {BUNDLE_JSON}: give a folder that `quantkit serve bundle` wrote"
        ) from None
    foreign.validated(Record, found, where=str(path), remedy=remedy)
    return found


def has_chat_template(checkpoint: Path) -> bool:
    """Whether a checkpoint directory brings a chat template, in either of the places that vLLM looks in."""
    own = (checkpoint / "chat_template.jinja").is_file()
    return own or bool(_json(checkpoint / "tokenizer_config.json").get("chat_template"))


def read_flags(bundle: Path, profile: Profile) -> dict[str, Any]:
    """The vLLM settings of one profile, by flag.

    Raises:
        QuantkitError: the folder holds none, or no settings.
    """
    path = config_path(bundle, profile)
    found = foreign.yaml_value(path, what="settings file")
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise QuantkitError(f"{path} holds no settings: build the bundle again")
    return found


def config_path(bundle: Path, profile: Profile) -> Path:
    """The vLLM settings file of one profile.

    Raises:
        QuantkitError: the folder holds none.
    """
    path = bundle / CONFIG_FILES[profile]
    if not path.is_file():
        raise QuantkitError(f"{path} is not there: give a folder that `quantkit serve bundle` wrote")
    return path
