"""Where the hidden states of the calibration set lie: in files that are mapped into memory, a set for each layer.

The kernel keeps mapped pages in memory while there is room and takes them back when there is not, so the size of the
calibration set bounds no run; and a run that was killed finds the states of the layer it stood before.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def make(folder: Path, index: int, name: str, shape: Sequence[int]) -> Tensor:
    """A new float32 tensor in the file for stream `name` before layer `index`; its values are whatever."""
    path = _path(folder, index, name)
    path.unlink(missing_ok=True)
    return _mapped(path, shape)


def find(folder: Path, index: int, name: str, shape: Sequence[int]) -> Tensor | None:
    """The states that `make` gave and `commit` kept, or None."""
    path = _path(folder, index, name)
    if not path.exists() or path.stat().st_size != _num_bytes(shape):
        return None
    return _mapped(path, shape)


def commit(folder: Path, index: int) -> None:
    """Have the states before layer `index` on the disk: what they were made for may now be kept."""
    for path in folder.glob("states-*.f32"):
        if path.name.startswith(f"states-{index:05d}-"):
            with path.open("rb") as file:
                os.fsync(file.fileno())


def drop_before(folder: Path, index: int) -> None:
    """Delete the states before earlier layers than `index`."""
    for path in folder.glob("states-*.f32"):
        if int(path.name.split("-")[1]) < index:
            path.unlink()


def scratch(folder: Path, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A mapped tensor for use within a layer; its file goes with the next one of that name."""
    path = folder / f"scratch-{name}.bin"
    path.unlink(missing_ok=True)
    return _mapped(path, shape, dtype)


def reopen_scratch(folder: Path, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What `scratch` gave before, mapped again: what is not mapped does not count as this process's memory."""
    return _mapped(folder / f"scratch-{name}.bin", shape, dtype)


def drop_scratch(folder: Path, name: str) -> None:
    """Delete the file of a scratch tensor that nobody will look at again."""
    (folder / f"scratch-{name}.bin").unlink(missing_ok=True)


def _path(folder: Path, index: int, name: str) -> Path:
    return folder / f"states-{index:05d}-{name}.f32"


def _num_bytes(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * 4


def _mapped(path: Path, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    size = torch.Size(shape).numel()
    if not path.exists():
        # Taken at once: a mapped file that finds the disk full when it is written to ends the process by SIGBUS.
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(*shape)
