"""The door for one model: what travels between its ranks.

A `Group` moves flat buffers (gather, exchange of leaves, broadcast) and small control messages. Everything
large is asynchronous and straight into memory that the caller owns; every wait that fails says which
collective of which unit it was, and why, if any rank knows. With one rank there is no process group and every call is
a no-op.

What all ranks must run alike is folded into a fingerprint (`records`), which travels with every announcement. Loans
are free to differ, and are not.
"""

import atexit
import json
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardstep.collectives.ends import close_watches, start_watch
from shardstep.collectives.heard import Wait
from shardstep.collectives.pending import Announcement, Pending, Traffic, framed
from shardstep.collectives.records import Records
from shardstep.collectives.watch import EXPLAIN_S, Watch
from shardstep.collectives.whereabouts import Whereabouts
from shardstep.collectives.wire import ProcessGroup, Wire, leave_process_group, place_in, world
from shardstep.errors import CollectiveError, ConfigError, RankMismatchError

JSON_LIMIT_BYTES = 1 << 20
"""The longest JSON message a rank may send."""

_BROADCAST, _SMALL, _FIRST_TAG = 0, 1, 3
"""Tags of the door's own; those of a model's spaces follow."""

BUILDING = 2 - _FIRST_TAG
"""The tag for what travels before a model has spaces."""


def disconnect() -> None:
    """Leave the process group, if there is one."""
    _close_groups()
    leave_process_group()


class Group:
    """The ranks that share one model.

    ``process_group`` defaults to the whole world when torch.distributed is initialised, and to this process
    alone when it is not. ``checked``: all ranks compare every collective before they run it.
    """

    def __init__(self, process_group: ProcessGroup | None = None, *, checked: bool = False) -> None:
        self.rank, self.size, self.traffic = 0, 1, Traffic()
        self.records, self.whereabouts, self.checked = Records(), Whereabouts(), checked
        self._number: int | None = None
        self._tags: int | None = None
        data = process_group or world()
        if data is None:
            return
        self.rank, self.size = place_in(data)
        if self.rank < 0:
            raise ConfigError("expected this process to be a member of the group given to shard(), but it is not")
        if self.size > 1:
            self._watch = _watch_over(data)
            self._wire, self.whereabouts = self._watch.wire, self._watch.whereabouts
            self._lent: weakref.WeakSet[Pending] = weakref.WeakSet()
            _GROUPS.add(self)

    @property
    def members(self) -> list[int]:
        """The ranks in the whole world, in order."""
        return self._wire.members if self.size > 1 else [0]

    def close(self) -> None:
        """Let go of torch's groups.

        While anybody refers to one, gloo's threads go on past destroy_process_group() and into the interpreter's
        last moments, where they abort the process.
        """
        for pending in list(self._lent):
            pending.forget()
        del self._wire, self._watch
        _GROUPS.discard(self)

    # - large: straight into the caller's memory

    def all_gather(
        self, flat: Tensor, shard: Tensor, *, tag: int, label: str, ordered: bool = True, together: bool = True
    ) -> Pending:
        """Fill ``flat`` (size × n elements) from every rank's ``shard`` (n elements), in rank order.

        ``shard`` may be this rank's own run of ``flat``; otherwise it is copied there. ``ordered``: all ranks
        gather this at the same place among their collectives. ``together``: they wait for it in the same order, too.
        """
        chunks = flat.chunk(self.size)
        if chunks[self.rank].data_ptr() != shard.data_ptr():
            chunks[self.rank].copy_(shard)
        if self.size == 1:
            return Pending((), label, self)
        if ordered:
            self._record(label, flat.nbytes, flat.dtype)
        return self._messages([shard] * self.size, chunks, tag, label, offers=ordered and together)

    def exchange(self, flat: Tensor, received: Sequence[Tensor | None], *, tag: int, label: str) -> Pending:
        """Send run r of ``flat`` to rank r, and receive every peer's run for this rank into ``received[peer]``.

        ``received`` has one tensor (n elements) for each rank, and None at this rank's own place. All ranks wait for
        their exchanges in the same order.
        """
        if self.size == 1:
            return Pending((), label, self)
        self._record(label, flat.nbytes, flat.dtype)
        return self._messages(flat.chunk(self.size), received, tag, label)

    def deal(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, tag: int, label: str) -> Pending:
        """Send ``outgoing[rank]`` to every peer and receive ``incoming[rank]`` from it, of whatever lengths; what is
        empty does not travel.
        """
        if self.size == 1:
            return Pending((), label, self)
        self._record(label, 0, None)
        return self._messages(outgoing, incoming, tag, label)

    def broadcast(self, tensor: Tensor, *, label: str) -> None:
        """Overwrite ``tensor`` with rank 0's."""
        if self.size == 1:
            return
        self._record(label, tensor.nbytes, tensor.dtype)
        if self._wire.batched:
            self._count(tensor.nbytes if self.rank == 0 else 0)
            self.wait([self._try(label, self._wire.broadcast, tensor)], label)
        else:
            self._hand_down(tensor, label)

    def all_gather_small(self, tensor: Tensor, *, label: str) -> Tensor:
        """All ranks' tensors of equal shape, stacked in rank order."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        self._record(label, tensor.nbytes, tensor.dtype)
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        if self._wire.batched:
            self._count(tensor.nbytes * (self.size - 1))
            self.wait([self._try(label, self._wire.all_gather, parts, tensor)], label)
        else:
            parts[self.rank] = tensor.contiguous()
            self._messages([parts[self.rank]] * self.size, parts, _SMALL - _FIRST_TAG, label).wait()
        return torch.stack(parts)

    # - loans

    @property
    def lends(self) -> bool:
        """Whether a message may be posted long before its other half."""
        return self.size > 1 and not self._wire.batched

    def reads(self, peer: int, tensor: Tensor) -> bool:
        """Whether this rank and a peer can read one another's tensors like this one, which then need not be lent."""
        return self._wire.reads(peer, tensor)

    def lend(self, shard: Tensor, peer: int, *, tag: int, label: str) -> Pending:
        """Post ``shard`` for ``peer``, who takes it when it likes: its values of that time. Done when it has them."""
        pending = Pending([self._try(label, self._wire.send, shard, peer, self._tag(tag))], label, self)
        self._lent.add(pending)
        return pending

    def take(self, flat: Tensor, shard: Tensor, addresses: Sequence[int], *, tag: int, label: str) -> Pending:
        """As ``all_gather``, but every peer has lent its shard, or can be read: at its address."""
        chunks = flat.chunk(self.size)
        chunks[self.rank].copy_(shard)
        self._stop_if_ended(label)
        works = []
        for peer in (rank for rank in range(self.size) if rank != self.rank):
            if self.reads(peer, shard):
                self._try(label, self._wire.read, chunks[peer], peer, addresses[peer])
                self._count(chunks[peer].nbytes)
            else:
                works.append(self._try(label, self._wire.receive, chunks[peer], peer, self._tag(tag)))
        return Pending(works, label, self)

    def keep(self, lent: Sequence[object], owner: object) -> None:
        """Keep what was lent until ``owner`` is gone on every rank; before that, this process does not end either."""
        self._watch.keep(self._model, lent, owner)

    def count_loan(self, sent_bytes: int) -> None:
        """Note that what was lent has been taken."""
        self._count(sent_bytes)

    def leave(self, pending: Pending) -> None:
        """Let training end when ``pending`` is done, and not before, if nobody has waited for it until then."""
        if self.size > 1:
            self._watch.outstanding.add(pending)

    def reserve_tags(self, count: int) -> None:
        """Let messages of this model have tags 0 to ``count``, which are no other's; all ranks do so in one order."""
        if self.size > 1:
            self._tags = self._wire.reserve_tags(count + _FIRST_TAG)

    # - small: over the control channel

    def announce(self, values: Sequence[int], *, label: str) -> Announcement:
        """Tell every rank a few integers over the control channel, without waiting for theirs."""
        if self.size == 1:
            return Announcement([], [], self, [list(values)])
        self._note(label, len(values), None)
        head = (self._model, self.records.count, self.records.value)
        sent = [self._try(label, self._wire.gather_control, frame) for frame in framed(head, values)]
        return Announcement([parts for parts, _ in sent], [Pending([work], label, self) for _, work in sent], self)

    def exchange_json(self, value: object, *, label: str) -> list[Any]:
        """Every rank's value, in rank order, carried as JSON of at most ``JSON_LIMIT_BYTES``."""
        if self.size == 1:
            return [value]
        payload = json.dumps(value).encode()
        if len(payload) > JSON_LIMIT_BYTES:
            raise ConfigError(
                f"expected at most {JSON_LIMIT_BYTES} bytes of JSON for {label}, got {len(payload)} on rank {self.rank}"
            )
        announcement = self.announce([len(payload)], label=label)
        lengths = [row[0] for row in announcement.rows()]
        announcement.compare()
        if max(lengths) > JSON_LIMIT_BYTES:
            raise CollectiveError(f"{label}: a peer announced {max(lengths)} bytes, more than {JSON_LIMIT_BYTES}")
        own = torch.zeros(max(lengths), dtype=torch.uint8)
        own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        parts, work = self._try(label, self._wire.gather_control, own)
        self.wait([work], label)
        return [json.loads(part[:length].numpy().tobytes()) for part, length in zip(parts, lengths, strict=True)]

    # - when something is wrong

    def wait(self, works: Sequence[Any], label: str) -> None:
        """Wait for all of ``works``. Raises the cause, or the best that is known about it, if that fails."""
        begin = time.monotonic()
        self._watch.waiting = Wait(label, self._model, self.records, begin)
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self.failure(label, error) from error
        finally:
            self._watch.arrived()
        self.traffic.wait_s += time.monotonic() - begin

    def failure(self, label: str, error: Exception) -> CollectiveError:
        """The error to raise when the collective ``label`` failed with ``error``."""
        return self._watch.failure(label, (str(error) or type(error).__name__).splitlines()[0].split(". ")[0])

    def mismatch(self) -> RankMismatchError:
        """The error to raise when fingerprints differ: all ranks tell their latest collectives, and compare."""
        self._watch.tell_records(self._model, self.records)
        cause = self._watch.explain(2 * EXPLAIN_S)
        text = "expected every rank to run the same collectives in the same order, but they differ"
        return RankMismatchError(cause.text if cause is not None else text)

    def _record(self, label: str, nbytes: int, dtype: torch.dtype | None) -> None:
        """Note what all ranks run alike; with ``checked``, make sure of it first."""
        self._note(label, nbytes, dtype)
        if self.checked:
            self.announce([nbytes], label=f"check before the {label}").compare()

    def _note(self, label: str, nbytes: int, dtype: torch.dtype | None) -> None:
        self._stop_if_ended(label)
        self.records.add(label, nbytes, dtype)

    def _stop_if_ended(self, label: str) -> None:
        if self._watch.cause is not None:
            raise self._watch.failure(label, "")

    @property
    def _model(self) -> int:
        """The number of this model among those of the same ranks, in the order of their first collectives."""
        if self._number is None:
            self._number = len(self._watch.models)
            self._watch.models[self._number] = self.records
        return self._number

    def _tag(self, tag: int) -> int:
        if self._tags is None:
            self.reserve_tags(8)
        return (self._tags or 0) + _FIRST_TAG + tag

    def _messages(
        self, outgoing: Sequence[Tensor], incoming: Sequence[Any], tag: int, label: str, *, offers: bool = True
    ) -> Pending:
        """Post one message to and one from each peer, the nearest rank first so that no rank is a hot spot."""
        sent, received = list[tuple[Tensor, int]](), list[tuple[Tensor, int]]()
        for distance in range(1, self.size):
            target, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            if outgoing[target].numel():
                sent.append((outgoing[target], target))
                self._count(outgoing[target].nbytes)
            if incoming[source].numel():
                received.append((incoming[source], source))
        post = partial(self._wire.send_and_receive, offers=offers)
        return Pending(self._try(label, post, sent, received, self._tag(tag)), label, self)

    def _hand_down(self, tensor: Tensor, label: str) -> None:
        """A broadcast along a binary tree: a rank has it from the one without its lowest bit."""
        tag, low = self._tag(_BROADCAST - _FIRST_TAG), self.rank & -self.rank
        if self.rank:
            self.wait([self._try(label, self._wire.receive, tensor, self.rank - low, tag)], label)
        below = low or 1 << (self.size - 1).bit_length()
        works = []
        while below := below >> 1:
            if self.rank + below < self.size:
                works.append(self._try(label, self._wire.send, tensor, self.rank + below, tag))
                self._count(tensor.nbytes)
        self.wait(works, label)

    def _try(self, label: str, call: Callable[..., Any], *args: Any) -> Any:
        """Post something. Raises as ``wait`` does."""
        try:
            return call(*args)
        except RuntimeError as error:
            raise self.failure(label, error) from error

    def _count(self, sent_bytes: int) -> None:
        self.traffic.sent_bytes += sent_bytes
        self.traffic.calls += 1


_GROUPS: weakref.WeakSet[Group] = weakref.WeakSet()

_OVER: dict[int, tuple[ProcessGroup, Watch]] = {}
"""By the id of a group: the group, and what watches over it for all models that are sharded over it."""


def _watch_over(data: ProcessGroup) -> Watch:
    if id(data) not in _OVER:
        _OVER[id(data)] = (data, start_watch(Wire(data)))
    return _OVER[id(data)][1]


@atexit.register
def _close_groups() -> None:
    close_watches()
    _OVER.clear()
    for group in list(_GROUPS):
        group.close()
