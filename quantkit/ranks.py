"""Which part of the work is this process's, under `torchrun --nproc-per-node N`; all of it without.

Calibration samples are split over the ranks and what was summed over them is added up; the rows of a weight, which do
not touch each other, are split over the ranks and what was chosen for them is handed round.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.formats import Grid, QuantizedWeight

Value = TypeVar("Value")

# That a rank waits for another's part of what all do together. A rank that died is noticed at once, by its closed
# connections; a machine that is gone is not.
_PATIENCE = timedelta(minutes=30)
_HOME = "home"
_KNOCK = timedelta(minutes=1)  # how often a rank that has nothing to do asks whether the store is still there


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that torchrun started; yields this one's device. Without torchrun: the device, alone.

    Raises:
        QuantkitError: another rank has died, or its machine answers no more.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
    try:
        dist.init_process_group("gloo" if own == "cpu" else "nccl", timeout=_PATIENCE)
        yield own
    except RuntimeError as error:
        if not _of_the_network(error):
            raise
        reason = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split())).split(". ")[0]
        raise QuantkitError(
            f"rank {os.environ.get('RANK')} waited for another one that is gone ({reason[:200]}): look at the other "
            "ranks' output, and start the same command again; it goes on where it stopped"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _of_the_network(error: RuntimeError) -> bool:
    """Whether this is how torch says that others are gone: of NCCL and the store by type, of gloo in words alone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class Order(Protocol):
    """Work that all ranks do together, as rank 0 hands it out."""

    def follow(self, device: str) -> None:
        """Take part in it, on another rank than 0."""


HandOut = Callable[[Order], None]


@contextmanager
def leading() -> Iterator[HandOut]:
    """On rank 0: yields what tells the other ranks to follow, before each work; leaving sends them home."""
    numbers = itertools.count()

    def hand_out(order: Order) -> None:
        if world_size() > 1:
            _call(f"order {next(numbers)}")
            dist.broadcast_object_list([order], src=0)

    try:
        yield hand_out
    except BaseException:
        # In the midst of what all do together they do not listen: they end when this process does.
        if world_size() > 1:
            with suppress(dist.DistError):
                _call(f"order {next(numbers)}", _HOME)
        raise
    if world_size() > 1:
        _call(f"order {next(numbers)}", _HOME)
        with suppress(RuntimeError):  # of one that is gone already
            barrier()  # it may be this process that keeps what they listen to


def follow(device: str) -> None:
    """On the other ranks: take part in whatever rank 0 hands out, until it sends them home."""
    for number in itertools.count():
        if _wait_for(f"order {number}") == _HOME:
            break
        order: list[Order | None] = [None]
        dist.broadcast_object_list(order, src=0)
        assert order[0] is not None
        order[0].follow(device)
    with suppress(RuntimeError):
        barrier()


def from_first(name: str, make: Callable[[], Value]) -> Value:
    """What rank 0 makes, on every rank, however long it takes. name: of this very thing, in the life of the job."""
    made: list[Any] = [make() if rank() == 0 else None]
    if world_size() > 1:
        if rank() == 0:
            _call(name)
        _wait_for(name)
        dist.broadcast_object_list(made, src=0)
    value: Value = made[0]
    return value


def _call(name: str, what: str = "") -> None:
    """On rank 0: end the others' wait."""
    _store().set(f"quantkit {name}", what)


def _wait_for(name: str) -> str:
    """Wait until rank 0 calls, for hours while vLLM writes; not by a collective, which would take that for its end."""
    while True:
        try:
            _store().wait([f"quantkit {name}"], _KNOCK)
        except dist.DistStoreError:  # not yet; a store that is gone is a DistNetworkError
            continue
        return str(_store().get(f"quantkit {name}").decode())


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # where the ranks met


def rank() -> int:
    """This process's number; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def share(samples: Tensor) -> Tensor:
    """This rank's samples: every N-th one."""
    return samples[rank() :: world_size()].contiguous()


def sum_up(sums: dict[str, Tensor], count: int) -> int:
    """Add up, in place, what the ranks summed over their samples; returns the added-up count."""
    if world_size() == 1:
        return count
    for name in sorted(sums):
        dist.all_reduce(sums[name])
    # NCCL adds up on GPUs alone: where there is nothing else to add, the count goes to this process's, as in `joined`
    alone = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(count, device=next((tensor.device for tensor in sums.values()), alone))
    dist.all_reduce(total)
    return int(total)


def of_all(own: Value) -> list[Value]:
    """What each rank has, small, in their order, on every rank."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found


def collect(own: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Tensors of so many rows each, one of each rank, on rank 0 in their order; on the others nothing."""
    if rank() > 0:
        if len(own):
            dist.send(_sendable(own), dst=0)
        return []
    parts = [own]
    for source in range(1, world_size()):
        part = _sendable(torch.empty(rows[source], *own.shape[1:], dtype=own.dtype))
        if len(part):
            dist.recv(part, src=source)
        parts.append(part.to(own.device))
    return parts


def deal(parts: Sequence[Tensor] | None, like: Tensor) -> Tensor:
    """On rank 0 a tensor for each rank, of which this one's is returned; the others give None, and their shape."""
    if rank() > 0:
        own = _sendable(like)
        if len(own):
            dist.recv(own, src=0)
        return own.to(like.device)
    assert parts is not None
    for target, part in enumerate(parts[1:], start=1):
        if len(part):
            dist.send(_sendable(part), dst=target)
    return parts[0]


def _sendable(tensor: Tensor) -> Tensor:
    """On the GPU where NCCL carries it, else on the CPU."""
    on_gpu = dist.get_backend() == "nccl"
    return tensor.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu").contiguous()


def take_largest(tensors: dict[str, Tensor]) -> None:
    """In place: of each element the largest that any rank has."""
    if world_size() > 1:
        for name in sorted(tensors):
            dist.all_reduce(tensors[name], op=dist.ReduceOp.MAX)


def by_rows(
    choose: Callable[[Tensor, Sequence[Tensor]], tuple[QuantizedWeight, float]],
    weight_OI: Tensor,
    blocks: Sequence[Tensor] = (),
) -> tuple[QuantizedWeight, float]:
    """`choose` for each rank's rows of the weight, and the whole result on every rank.

    blocks: [rows, rows] each, of rows that only one rank may choose for, in the order of the rows; `choose` gets those
        of its rows. With fewer blocks than ranks, only so many of them work.
    """
    ranks = min(world_size(), len(blocks)) if blocks else world_size()
    if ranks == 1:
        return choose(weight_OI, blocks)
    shares = [blocks[len(blocks) * r // ranks : len(blocks) * (r + 1) // ranks] for r in range(ranks)]
    sizes = [sum(map(len, share)) for share in shares]
    chunks = torch.split(weight_OI, sizes) if blocks else torch.tensor_split(weight_OI, ranks)
    mine = min(rank(), ranks - 1)  # a rank without rows does the last one's too, and keeps it to itself
    own, number = choose(chunks[mine], shares[mine])
    parts = []
    for source, rows_OI in enumerate(chunks):
        groups = own.grid.scale_OG.shape[1]
        made = (own.integers_OI, own.grid.scale_OG, own.grid.zero_point_OG)
        empty = (
            torch.empty(rows_OI.shape, dtype=torch.uint8, device=weight_OI.device),
            torch.empty(len(rows_OI), groups, device=weight_OI.device),
            torch.empty(len(rows_OI), groups, dtype=torch.int32, device=weight_OI.device),
        )
        received = tuple(tensor.contiguous() for tensor in (made if source == rank() else empty))
        for tensor in received:
            dist.broadcast(tensor, src=source)
        parts.append(received)
    integers_OI, scale_OG, zero_point_OG = (torch.cat(column) for column in zip(*parts, strict=True))
    grid: Grid = own.grid._replace(scale_OG=scale_OG, zero_point_OG=zero_point_OG)
    return QuantizedWeight(integers_OI, grid), number
