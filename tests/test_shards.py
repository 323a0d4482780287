"""Tensors written one at a time: the bytes of safetensors' own writer, and no file where one could not be finished."""

import errno
import json
import resource
import signal
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import shards
from quantkit.checkpoint import INDEX_NAME, open_checkpoint, write_dense, write_weights
from quantkit.shards import Entry

# more than one of a type, names whose order is not that of insertion, every type, no element, no dimension
TYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def every_type() -> dict[str, Tensor]:
    bytes_N = torch.randint(0, 2, (48,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = {}
    for number, dtype in enumerate(TYPES):
        for letter in "zaB":
            found[f"{letter}.{number}.w\u00e9ight"] = bytes_N.repeat(number % 3 + 1).view(dtype).view(2, -1)
    return found | {"one": torch.tensor(1.5), "none": torch.empty(0, 3, dtype=torch.float16)}


# one key: safetensors writes several in an order that differs from run to run, `write_file` by name
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"\u00e9\x1f": 'a "quote" \\ \x7f /'}])
@pytest.mark.parametrize("names", [0, 1, 5, None])
def test_the_bytes_are_those_of_safetensors(names: int | None, metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = dict(list(every_type().items())[:names])
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    shards.write_file(tmp_path / "ours", [shards.held(n, t) for n, t in tensors.items()], metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    again = [entry._replace(name=entry.name[2:]) for entry in shards.stored(tmp_path / "ours", prefix="p.")]
    shards.write_file(tmp_path / "again", again, metadata=metadata)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    shards.write_file(tmp_path / "file", [shards.held("turned", whole.T), shards.held("part", whole[1:, ::2])])
    found = load_file(tmp_path / "file")
    assert torch.equal(found["turned"], whole.T) and torch.equal(found["part"], whole[1:, ::2])


def test_one_tensor_stands_in_memory_and_they_come_in_the_order_given(tmp_path: Path) -> None:
    read: list[str] = []
    last: list[weakref.ref[Tensor]] = []

    def give(name: str) -> Tensor:
        assert not any(reference() is not None for reference in last), f"{read[-1]} is still there"
        tensor = torch.full((8, 8), float(len(read)))
        read.append(name)
        last[:] = [weakref.ref(tensor)]
        return tensor

    entries = (Entry(name, torch.float32, (8, 8), partial(give, name)) for name in ("c", "a", "d", "b", "e"))
    write_weights(tmp_path, entries, shard_bytes=2 * 8 * 8 * 4)
    assert read == ["c", "a", "d", "b", "e"]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": 5 * 8 * 8 * 4}
    assert list(index["weight_map"]) == read
    assert len(set(index["weight_map"].values())) == 3
    for place, (name, shard) in enumerate(index["weight_map"].items()):
        assert float(load_file(tmp_path / shard)[name].mean()) == place


def test_a_full_disk_says_so_and_leaves_no_file(tmp_path: Path) -> None:
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, room[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_weights(tmp_path, [shards.held("small", torch.ones(8)), shards.held("large", torch.ones(1 << 20))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
        signal.signal(signal.SIGXFSZ, kept)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_dense_copy_holds_what_the_checkpoint_says(tiny_llama: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_llama)
    write_dense(source, tmp_path / "copy")
    copy = open_checkpoint(tmp_path / "copy")
    assert set(copy.shards) == set(source.shards)
    for name, tensor in source.dense_tensors(dtype=torch.float16):
        assert torch.equal(copy.read([name])[name], tensor)
