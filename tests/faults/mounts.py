"""Disks that tests make: small ones, and folders that cannot be written. Only root may; elsewhere tests are skipped."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def _mount(*words: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A disk in memory of that size, for the length of the block."""
    place.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def resize(place: Path, size: str) -> None:
    """Give a small disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Have the folder refuse to be written, root too, for the length of the block."""
    _mount("--bind", folder, folder)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(place: Path) -> Path:
    """Take all that is free on a disk; returns the file to remove."""
    path = place / "somebody-elses-file"
    with path.open("ab", buffering=0) as file:
        for piece in (1 << 16, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(piece))
    return path
