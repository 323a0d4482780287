"""What flows between stages: a directory whose manifest, written last and by rename, means that it is complete."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from quantkit import __version__, provenance
from quantkit.errors import QuantkitError

MANIFEST_NAME = "quantkit.json"
PARTIAL_NAME = ".partial"

Kind = Literal["checkpoint", "tokens", "quantized", "answers", "draft", "report", "bundle", "served", "bench"]


class FileRecord(BaseModel):
    """One file of an artefact: its size in bytes and its SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    sha256: str


class Manifest(BaseModel):
    """What an artefact is, what it was made from and what was found while making it.

    `key` names the work: a digest of the kind, the digests of the inputs and the part of the recipe that shaped the
    bytes. An artefact is fresh while its key is unchanged and its files have the recorded sizes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Kind
    key: str
    inputs: dict[str, str]
    settings: dict[str, Any]
    results: dict[str, Any]
    files: dict[str, FileRecord]
    versions: dict[str, str]
    machine: dict[str, Any]
    cost: dict[str, float | int]
    finished: str


def work_key(kind: Kind, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """The digest that names a piece of work: same quantkit, kind, inputs and settings, same key."""
    named = {"quantkit": __version__, "kind": kind, "inputs": dict(inputs), "settings": dict(settings)}
    return provenance.digest_of(named)


def discard(directory: Path) -> None:
    """Remove an artefact, or what an interrupted try left of one; the manifest first, so it never looks complete.

    Raises:
        QuantkitError: the directory holds something that quantkit did not write.
    """
    if not directory.exists():
        return
    claim = directory / PARTIAL_NAME / "key"
    if read_manifest(directory) is None and not claim.is_file() and any(directory.iterdir()):
        raise QuantkitError(f"{directory} holds files that quantkit did not write: choose another --out")
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(directory)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a complete artefact, or None where there is none."""
    path = directory / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise QuantkitError(
            f"{path} is not a manifest of this quantkit ({_first_line(error)}): remove {directory} "
            "and run the stage again"
        ) from error


def is_fresh(directory: Path, key: str) -> bool:
    """Whether the directory holds the complete result of exactly this work: same key, every file present and whole."""
    manifest = read_manifest(directory)
    if manifest is None or manifest.key != key:
        return False
    return all(_has_size(directory / name, record.size) for name, record in manifest.files.items())


def digest(path: Path) -> str:
    """The digest of a stage's input: an artefact's by its manifest, any other file or directory by its bytes.

    The names and digests of the files count; seconds, machines and dates do not.
    """
    if path.is_file():
        return provenance.file_digest(path)
    manifest = read_manifest(path)
    if manifest is not None:
        return provenance.digest_of({name: record.sha256 for name, record in manifest.files.items()})
    if not path.is_dir():
        raise QuantkitError(f"{path} is not there: give a checkpoint directory or a file that exists")
    return provenance.digest_of({name: record.sha256 for name, record in record_files(path).items()})


def record_files(directory: Path, known: Mapping[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Size and digest of every file below the directory, but for the manifest and what is still being made.

    known: files that were recorded before and have not changed since; they are not read again.
    """
    records = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST_NAME and not name.startswith(PARTIAL_NAME):
            records[name] = (known or {}).get(name) or FileRecord(
                size=path.stat().st_size, sha256=provenance.file_digest(path)
            )
    return records


class Work:
    """An artefact while it is being made: where to write, and what to say in its manifest."""

    def __init__(self, out: Path, meter: provenance.Meter) -> None:
        self.out = out
        self.partial = out / PARTIAL_NAME
        self.results: dict[str, Any] = {}
        self._meter = meter

    def cost(self) -> dict[str, float | int]:
        """Seconds and peak memory so far."""
        return dict(self._meter.reading())


@contextmanager
def making(
    out: Path, kind: Kind, *, inputs: Mapping[str, str], settings: Mapping[str, Any], replace: bool = False
) -> Iterator[Work]:
    """Make an artefact in `out`; its manifest is written last, only when the block ends without an error.

    What an earlier, interrupted try of the same work left in `.partial` is kept for the block to resume from. A
    directory that holds anything else is refused, unless `replace` says that an artefact there may be emptied.

    Raises:
        QuantkitError: `out` holds another run, is being written by another process, or the disk is full.
    """
    key = work_key(kind, inputs, settings)
    _claim(out, key, replace=replace)
    with _exclusive(out / PARTIAL_NAME), provenance.Meter() as meter:
        work = Work(out, meter)
        yield work
        files = record_files(out)
        manifest = Manifest(
            kind=kind, key=key, inputs=dict(inputs), settings=dict(settings), results=work.results, files=files,
            versions=provenance.versions(), machine=provenance.machine(), cost=work.cost(),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        write_text(out / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
        shutil.rmtree(work.partial)


def _claim(out: Path, key: str, *, replace: bool) -> None:
    """Leave `out` ready for this work: as an interrupted try of the same work left it, or empty."""
    claim = out / PARTIAL_NAME / "key"
    if out.exists() and not out.is_dir():
        raise QuantkitError(f"{out} is a file: give an output directory")
    resumable = claim.is_file() and claim.read_text() == key and not (out / MANIFEST_NAME).exists()
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and not resumable:
        if not replace:
            manifest = read_manifest(out)
            holds = f"another run ({manifest.kind})" if manifest else "files that this run did not write"
            raise QuantkitError(f"{out} holds {holds}: choose another --out, or pass --fresh to replace what is there")
        discard(out)
    claim.parent.mkdir(parents=True, exist_ok=True)
    write_text(claim, key)


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory for this process alone; the lock goes with the process, so a kill leaves none behind."""
    with (directory / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise QuantkitError(
                f"{directory.parent} is being written by another quantkit: wait for it, or give another --out"
            ) from error
        yield


def cache(name: str) -> Path:
    """The folder of that name in $QUANTKIT_CACHE, else in the user's cache: what can be made again."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("QUANTKIT_CACHE") or caches / "quantkit").resolve() / name


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary name, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def link_or_copy(source: Path, destination: Path) -> None:
    """Place a file by hard link, or by copy where the file system has none (another disk, say)."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copy2(source, destination)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
