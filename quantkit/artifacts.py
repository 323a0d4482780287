"""What flows between stages: a directory whose manifest, written last and by rename, means that it is complete."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, StringConstraints
from safetensors import SafetensorError

from quantkit import __version__, foreign, provenance
from quantkit.errors import QuantkitError

MANIFEST_NAME = "quantkit.json"
PARTIAL_NAME = ".partial"
_KEY, _LOCK = "key", "lock"  # in .partial: whose work it is, and that somebody is at it
_FULL_BYTES = 1 << 20  # no more free, and the disk is the cause of whatever failed
_EMPTYING = "is being emptied"  # instead of a key; what a kill then leaves is emptied again, never gone on with

Kind = Literal["checkpoint", "tokens", "quantized", "answers", "draft", "report", "bundle", "served", "bench"]


def _inside(name: str) -> str:
    """The name of a file of an artefact, where it is one: a path that stays in its folder."""
    if not all(map(foreign.is_name, name.split("/"))):
        raise ValueError("is no name of a file in the folder")
    return name


class FileRecord(BaseModel):
    """One file of an artefact: its size in bytes and its SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: NonNegativeInt
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


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
    files: dict[Annotated[str, AfterValidator(_inside)], FileRecord]
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
        QuantkitError: the directory holds something that quantkit did not write, or is being written.
    """
    if not directory.exists():
        return
    if not _is_ours(directory):
        raise QuantkitError(f"{directory} holds files that quantkit did not write: choose another --out")
    with _exclusive(directory):
        _empty(directory)
        (directory / PARTIAL_NAME / _KEY).unlink()
    directory.rmdir()


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a complete artefact, or None where there is none."""
    remedy = f"it is not a manifest of this quantkit: remove {directory} and run the stage again"
    try:
        return foreign.json_model(directory / MANIFEST_NAME, Manifest, remedy=remedy, within=directory)
    except FileNotFoundError:
        return None


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
    _refuse(out, key, replace=replace)
    with _exclusive(out), provenance.Meter() as meter:
        _refuse(out, key, replace=replace)  # another process may have finished it meanwhile
        _claim(out, key)
        work = Work(out, meter)
        with _full_disk_told(out):
            yield work
        files = record_files(out)
        manifest = Manifest(
            kind=kind, key=key, inputs=dict(inputs), settings=dict(settings), results=work.results, files=files,
            versions=provenance.versions(), machine=provenance.machine(), cost=work.cost(),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        write_text(out / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
        _remove(work.partial, keep=(_LOCK,))


def tidy(out: Path) -> None:
    """Remove what a kill right behind the manifest left of the work in a complete artefact: it can be gigabytes."""
    if (out / PARTIAL_NAME).is_dir():
        with _exclusive(out):
            _remove(out / PARTIAL_NAME, keep=(_LOCK,))


@contextmanager
def _full_disk_told(out: Path) -> Iterator[None]:
    """Say that the disk is full where others do not: libraries have errors of their own; vLLM's log is on it too."""
    try:
        yield
    except (QuantkitError, RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(out).free > _FULL_BYTES:
            raise
        if isinstance(error, QuantkitError):
            raise QuantkitError(
                f"{error} (the disk of {out} is full: free some space and run the same command again)"
            ) from error
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error


def _refuse(out: Path, key: str, *, replace: bool) -> None:
    """Refuse a place that holds something else than this work or nothing; `replace` allows another artefact there."""
    if out.exists() and not out.is_dir():
        raise QuantkitError(f"{out} is a file: give an output directory")
    if not out.is_dir() or _is_resumable(out, key) or _only_begun(out) or (replace and _is_ours(out)):
        return
    manifest = read_manifest(out)
    if replace:
        raise QuantkitError(f"{out} holds files that quantkit did not write: choose another --out")
    holds = f"another run ({manifest.kind})" if manifest else "files that this run did not write"
    raise QuantkitError(f"{out} holds {holds}: choose another --out, or pass --fresh to replace what is there")


def _claim(out: Path, key: str) -> None:
    """Leave `out` with nothing but what an interrupted try of this work left in `.partial`."""
    if _is_resumable(out, key):
        _remove(out, keep=(PARTIAL_NAME,))  # halves of results, which are written anew
        return
    _empty(out)
    write_text(out / PARTIAL_NAME / _KEY, key)


def _is_resumable(out: Path, key: str) -> bool:
    claim = out / PARTIAL_NAME / _KEY
    return claim.is_file() and claim.read_text() == key and not (out / MANIFEST_NAME).exists()


def _is_ours(out: Path) -> bool:
    """Whether all that the directory holds was written here, at whatever moment the writer was killed."""
    return (out / PARTIAL_NAME / _KEY).is_file() or _only_begun(out) or read_manifest(out) is not None


def _only_begun(out: Path) -> bool:
    """Whether there is nothing, or what a process leaves that is killed before it has written its key."""
    if any(path.name != PARTIAL_NAME for path in out.iterdir()):
        return False
    partial = out / PARTIAL_NAME
    found = {path.name for path in partial.iterdir()} if partial.exists() else set()
    return found <= {_LOCK, _KEY, f".{_KEY}.tmp"} and (_KEY not in found or (partial / _KEY).read_text() == _EMPTYING)


def _empty(out: Path) -> None:
    """Remove all but lock and key; killed meanwhile, the directory is still ours, and has still to be emptied."""
    partial = out / PARTIAL_NAME
    write_text(partial / _KEY, _EMPTYING)
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    _remove(out, keep=(PARTIAL_NAME,))
    _remove(partial, keep=(_KEY, _LOCK))


def _remove(directory: Path, *, keep: tuple[str, ...]) -> None:
    for path in sorted(directory.iterdir()):
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Hold the directory for this process alone, and leave no trace of that in what is finished."""
    with locked(out / PARTIAL_NAME / _LOCK, what=out):
        try:
            yield
        finally:
            # What holds nothing to go on from claims no folder: another input may be given the next time.
            with suppress(OSError):
                left = {path.name for path in (out / PARTIAL_NAME).iterdir()}
                if left == {_LOCK} or (left == {_LOCK, _KEY} and len(list(out.iterdir())) == 1):
                    shutil.rmtree(out / PARTIAL_NAME)


@contextmanager
def locked(path: Path, *, what: Path) -> Iterator[TextIO]:
    """Hold a file, made where there is none, for this process alone; the lock goes with the process, however it ends.

    Raises:
        QuantkitError: another process holds it; `what` is being written then.
    """
    with _open_and_lock(path, what=what) as handle:
        yield handle


def _open_and_lock(path: Path, *, what: Path) -> TextIO:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # whoever held it has just removed its folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever held it before may have removed the file: then this is a lock of nothing
            if path.exists() and path.stat().st_ino == os.fstat(handle.fileno()).st_ino:
                return handle
        except OSError as error:
            handle.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise QuantkitError(
                f"{what} is being written by another quantkit: wait for it, or give another --out"
            ) from error
        handle.close()


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
