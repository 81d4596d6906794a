"""The one file that touches torch.distributed: connections, messages, and how to cut them.

A `Wire` joins the ranks of one process group: the group itself, for data, and a small gloo group for control
messages, whatever kind the group is. Nothing here knows models or what messages mean.

Chosen by measurement on gloo (CPU time for 12.6 MB, 2 ranks): point-to-point messages straight into views
2.4 ms, asynchronous broadcasts 3.6, all_gather_into_tensor 3.6; a leaf exchanged by messages and summed 2.8,
by all_to_all_single 3.6, reduce_scatter_tensor 7.0. A message carries a tag, in which its size and dtype are
mixed: where ranks disagree, nothing arrives, and nobody computes with bytes that were meant for something else.
Ranks of one machine can do without most messages: see `neighbours`.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from shardstep.collectives.lines import LONGEST_BYTES
from shardstep.collectives.neighbours import Neighbours
from shardstep.collectives.records import check_bits
from shardstep.errors import ConfigError

ProcessGroup = dist.ProcessGroup
FOREVER = timedelta(days=3650)
_OURS = 1 << 30
"""Set in every tag of ours; users' own messages on the same group have small ones."""
_NEVER_SENT, _NEWS = 1, 2
"""Tags of the control group."""


def connect_local(rank: int, world_size: int, store_path: str, timeout_s: float = 60.0) -> None:
    """Join ``world_size`` processes of this machine over gloo, listening on loopback only.

    The ranks meet through the file ``store_path`` (a TCP store would listen on every interface).
    """
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is None:
        raise ConfigError(f"expected a loopback interface named lo or lo0 for local ranks, got {names}")
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    dist.init_process_group(
        "gloo",
        store=FileStore(store_path, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def leave_process_group() -> None:
    """Leave torch's process groups, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world() -> ProcessGroup | None:
    """All ranks, if torch.distributed is initialised. Raises ConfigError if it should be: under torchrun with several
    processes, each of them would train a model of its own.
    """
    if not dist.is_available():
        return None
    if dist.is_initialized():
        return dist.group.WORLD
    started = os.environ.get("WORLD_SIZE", "1")
    if dist.is_torchelastic_launched() and started != "1":
        raise ConfigError(
            f"expected torch.distributed.init_process_group() before the first call of shardstep in a script that "
            f"torchrun has started {started} times, got none; call it at the begin of the script"
        )
    return None


def place_in(group: ProcessGroup) -> tuple[int, int]:
    """This process's rank in ``group``, negative if it is no member, and the group's size."""
    return dist.get_rank(group), dist.get_world_size(group)


class Wire:
    """The connections of this rank to the others of ``data``."""

    def __init__(self, data: ProcessGroup) -> None:
        self.rank, self.size = place_in(data)
        self.batched = dist.get_backend(data) != "gloo"
        """Whether messages must be posted on both sides at once, and carry no tags (NCCL)."""
        self.timeout = _timeout(data)
        self.members: list[int] = dist.get_process_group_ranks(data)
        """The ranks in the whole world, in order."""
        self._data = data
        # Three threads of gloo, which wake up a hundred times a second: one such group for all models.
        # Its timeout is longer than the user's, so that whoever watches has the time to tell why a wait ends.
        timeout = self.timeout + timedelta(seconds=10)
        self._control = dist.new_group(self.members, backend="gloo", timeout=timeout, use_local_synchronization=True)
        self._next_tag = 0
        self._neighbours = Neighbours(self.rank, self._tell)

    def _tell(self, own: Sequence[int]) -> list[list[int]]:
        """Each rank's integers, of which all have as many."""
        parts, work = self._gather_by_gloo(torch.tensor(own, dtype=torch.int64))
        work.wait()
        return [part.tolist() for part in parts]

    def reserve_tags(self, count: int) -> int:
        """The first of ``count`` tags that no other model on these ranks has; all ranks ask in the same order."""
        first, self._next_tag = self._next_tag, self._next_tag + count
        return first

    # - data

    def send(self, tensor: Tensor, peer: int, tag: int) -> Any:
        """Post a message; torch's handle of it."""
        return dist.isend(tensor, self.members[peer], group=self._data, tag=_marked(tag, tensor))

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Any:
        """Post the other half of a message."""
        return dist.irecv(tensor, self.members[peer], group=self._data, tag=_marked(tag, tensor))

    def send_and_receive(
        self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]], tag: int, *, offers: bool
    ) -> list[Any]:
        """Post messages to and from peers. ``offers``: what neighbours need may be offered instead."""
        if self.batched:
            operations = [(dist.isend, *pair) for pair in sent] + [(dist.irecv, *pair) for pair in received]
            batch = [dist.P2POp(call, tensor, self.members[peer], self._data) for call, tensor, peer in operations]
            return list(dist.batch_isend_irecv(batch)) if batch else []
        give, get = self._neighbours.offer, self._neighbours.accept
        given, got = list[Any](), list[Any]()
        for tensor, peer in sent:
            near = offers and self.reads(peer, tensor)
            given.append(give(tensor, peer, _marked(tag, tensor)) if near else self.send(tensor, peer, tag))
        for tensor, peer in received:
            near = offers and self.reads(peer, tensor)
            got.append(get(tensor, peer, _marked(tag, tensor)) if near else self.receive(tensor, peer, tag))
        return [*got, *given]

    def reads(self, peer: int, tensor: Tensor) -> bool:
        """Whether this rank and a peer can read one another's tensors like this one."""
        return not self.batched and self._neighbours.are_near[peer] and tensor.is_cpu

    def read(self, tensor: Tensor, peer: int, address: int) -> None:
        """Overwrite ``tensor`` with what is at ``address`` in the memory of a neighbour."""
        self._neighbours.read(tensor, peer, address)

    def broadcast(self, tensor: Tensor) -> Any:
        """torch's own broadcast of rank 0's values; for groups that are batched."""
        return dist.broadcast(tensor, src=self.members[0], group=self._data, async_op=True)

    def all_gather(self, parts: list[Tensor], own: Tensor) -> Any:
        """torch's own all_gather; for groups that are batched."""
        return dist.all_gather(parts, own, group=self._data, async_op=True)

    # - control

    def gather_control(self, own: Tensor) -> tuple[list[Tensor], Any]:
        """Tell every rank a small tensor; where theirs will be, and a handle as torch's."""
        if own.nbytes > LONGEST_BYTES or not self._neighbours.are_all:
            return self._gather_by_gloo(own)
        gathering = self._neighbours.gather(own)
        return gathering.parts, gathering

    def _gather_by_gloo(self, own: Tensor) -> tuple[list[Tensor], Any]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        return parts, dist.all_gather(parts, own, group=self._control, async_op=True)

    def pass_on(self, message: Tensor) -> None:
        """Send news to the next rank, and wait until it has been taken."""
        self._control.send([message], (self.rank + 1) % self.size, _NEWS).wait(FOREVER)

    def listen(self, message: Tensor) -> None:
        """Wait for news from the rank before this one. Raises RuntimeError when that is gone, or after a cut."""
        self._control.recv([message], (self.rank - 1) % self.size, _NEWS).wait(FOREVER)

    # - the end

    def cut(self) -> None:
        """Make every wait on these ranks fail, now and from now on; also on the other side of each connection."""
        if self.batched:
            self._abort()
        else:
            self._break(self._data)
        self._neighbours.lines.cut()
        self.hang_up()

    def hang_up(self) -> None:
        """As ``cut``, for control messages only."""
        self._break(self._control)

    def _break(self, group: ProcessGroup) -> None:
        """gloo gives up all connections of a group when a wait times out, so wait for what is never sent."""
        with suppress(RuntimeError):
            never = group.recv([torch.empty(1)], (self.rank + 1) % self.size, _NEVER_SENT)
            never.wait(timedelta(milliseconds=1))

    def _abort(self) -> None:
        """The same for NCCL, which has a call for it. Never run by our tests: they have no two GPUs."""
        with suppress(RuntimeError):
            abort = getattr(self._data._get_backend(torch.device("cuda")), "abort", None)
            if abort is not None:
                abort()


def _marked(tag: int, tensor: Tensor) -> int:
    return _OURS | tag << 7 | check_bits(tensor.nbytes, tensor.dtype)


def _timeout(group: ProcessGroup) -> timedelta:
    """The timeout that the user gave to ``group``, which the control channel keeps as well."""
    for device in ("cpu", "cuda"):
        try:
            options = group._get_backend(torch.device(device)).options
        except RuntimeError:
            continue
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return timedelta(minutes=30)
