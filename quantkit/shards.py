"""How do tensors become a safetensors file without standing in memory together? The header first, then one at a time.

Eight bytes hold the header's length; the header says of each tensor its type, its shape and which bytes are its own;
then come the bytes. All but the last is known before any tensor is read.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

# In the order that safetensors lays tensors out by, first to last: every tensor begins at a multiple of its own size.
_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(_DTYPES.values())}


class Entry(NamedTuple):
    """A tensor that will be written: what the header says of it, and what gives it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # of that type and shape; called once

    @property
    def num_bytes(self) -> int:
        """What it takes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def held(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor that is in memory already."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def stored(path: Path, *, prefix: str = "") -> Iterator[Entry]:
    """The tensors of a safetensors file, by name, the prefix before each; the file is mapped while one is read."""
    with safe_open(path, framework="pt") as handle:
        names = sorted(handle.keys())
        slices = {name: handle.get_slice(name) for name in names}
        facts = {name: (_DTYPES[view.get_dtype()], tuple(view.get_shape())) for name, view in slices.items()}
    for name, (dtype, shape) in facts.items():
        yield Entry(prefix + name, dtype, shape, partial(_read, path, name))


def write_file(path: Path, entries: Iterable[Entry], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time; whole or not at all, by rename.

    The bytes are those of `safetensors.torch.save_file`. Tensors are read in the order given, and stand in the file by
    type and name.

    Raises:
        OSError: the system's own (a full disk, say); no file is left.
    """
    entries = list(entries)
    header, begins = _header(entries, metadata)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for entry in entries:
                file.seek(len(header) + begins[entry.name])
                _put(file, entry)  # a function of its own, so that its tensor is gone before the next is read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(entries: list[Entry], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The file's beginning, and where after it each tensor begins."""
    said: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    begins: dict[str, int] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: (_PLACES[entry.dtype], entry.name)):
        assert entry.name not in begins, f"{entry.name} twice in a file"
        begin, end = end, end + entry.num_bytes
        begins[entry.name] = begin
        said[entry.name] = {"dtype": _WORDS[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins


def _put(file: BinaryIO, entry: Entry) -> None:
    tensor = entry.read()
    assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
    file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
        return tensor
