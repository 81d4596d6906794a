"""Ranks of one machine: memory read in place, pipes, and who is a neighbour at all."""

import multiprocessing
import os
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardstep as ss
from shardstep.collectives import Group, neighbours
from shardstep.collectives.lines import LONGEST_BYTES, Inlets, Lines, open_outlet
from shardstep.collectives.reading import Token, finds, read_into
from tests.sharding.models import Tied, Tokens, train

pytestmark = pytest.mark.usefixtures("neighbourly")

NUMEL = 100_003


def both_ends() -> Lines:
    """Lines of this process to itself, as rank 0 and rank 1 would have them."""
    inlets = Inlets([0, 1])
    outlets = {1: open_outlet(os.getpid(), inlets.ends[0][1]), 0: open_outlet(os.getpid(), inlets.ends[1][1])}
    return Lines(inlets.close_but([0, 1]), outlets)


# - memory


def shows_its_memory(pipe: Any) -> None:
    tensor, token = torch.arange(NUMEL, dtype=torch.int32), Token()
    pipe.send((os.getpid(), tensor.data_ptr(), token.address, token.value))
    pipe.recv()


@pytest.fixture
def other():
    """What ends another process, and that one's number, where it has a tensor and a token, and the token."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=shows_its_memory, args=(theirs,), daemon=True)
    process.start()

    def end() -> None:
        process.kill()
        process.join()

    yield end, ours.recv()
    end()


def test_another_process_is_read_in_place(other):
    _, (number, address, token_at, token) = other
    assert finds(number, token_at, token)
    assert not finds(number, token_at, token ^ 1), "another process may have the number"
    assert not finds(number, 8, token)
    read = torch.full((NUMEL + 1,), -1, dtype=torch.int32)
    read_into(read[1:], number, address)
    assert read.tolist() == [-1, *range(NUMEL)]


def test_a_process_that_has_ended_or_lies(other):
    end, (number, address, _, _) = other
    with pytest.raises(RuntimeError, match=rf"process {number} of this machine could not be read: Bad address"):
        read_into(torch.empty(4), number, 8)
    end()
    with pytest.raises(RuntimeError, match="could not be read: No such process"):
        read_into(torch.empty(4), number, address)


# - pipes


def test_messages_come_by_mark_and_in_order():
    lines = both_ends()
    for mark, payload in ((1, b"a"), (2, b"b"), (1, b""), (1 << 40, b"x" * LONGEST_BYTES)):
        lines.send(1, mark, payload)
    lines.send(0, 1, b"from 1")
    assert lines.receive(0, 1 << 40) == b"x" * LONGEST_BYTES
    assert [lines.receive(0, mark) for mark in (1, 1, 2)] == [b"a", b"", b"b"]
    assert lines.receive(1, 1) == b"from 1"


def test_more_than_a_pipe_holds_in_both_directions_at_once():
    lines, payload = both_ends(), b"x" * 1000
    for _ in range(200):  # a pipe holds 64 KiB: whoever writes into a full one reads what has arrived
        lines.send(1, 7, payload)
        lines.send(0, 7, payload)
    for rank in (0, 1):
        assert [lines.receive(rank, 7) for _ in range(200)] == [payload] * 200


def test_a_cut_ends_a_wait_and_all_after_it():
    lines = both_ends()
    threading.Timer(0.1, lines.cut).start()
    with pytest.raises(RuntimeError, match=r"were cut|from rank 1 is broken"):
        lines.receive(1, 7)
    with pytest.raises(RuntimeError, match=r"were cut|from rank 0 is broken"):
        lines.receive(0, 7)
    with pytest.raises(RuntimeError, match="the line to rank 1 is broken: Broken pipe"):
        lines.send(1, 7, b"")


def test_the_end_of_a_rank_ends_waits_for_it_but_not_what_it_has_said():
    inlets = Inlets([1])
    far = Lines({}, {0: open_outlet(os.getpid(), inlets.ends[1][1])})
    near = Lines(inlets.close_but([1]), {})
    far.send(0, 5, b"last words")
    del far
    assert near.receive(1, 5) == b"last words"
    with pytest.raises(RuntimeError, match="the line from rank 1 is broken"):
        near.receive(1, 5)


def test_a_rank_that_has_ended_is_nothing_to_who_waits_for_room_at_another():
    inlets = Inlets([1, 2])
    other = Inlets([0])
    Lines({}, {0: open_outlet(os.getpid(), inlets.ends[1][1])})  # rank 1, which is gone at once
    of_2 = Lines({}, {0: open_outlet(os.getpid(), inlets.ends[2][1])})
    here = Lines(inlets.close_but([1, 2]), {2: open_outlet(os.getpid(), other.ends[0][1])})
    at_2 = Lines(other.close_but([0]), {})
    payload, got = b"x" * 1000, list[bytes]()

    def read() -> None:
        time.sleep(0.1)
        got.extend(at_2.receive(0, 7) for _ in range(200))

    reader = threading.Thread(target=read)
    reader.start()
    of_2.send(0, 8, b"from 2")
    for _ in range(200):
        here.send(2, 7, payload)
    reader.join()
    assert got == [payload] * 200
    assert here.receive(2, 8) == b"from 2"
    with pytest.raises(RuntimeError, match="the line from rank 1 is broken"):
        here.receive(1, 7)


def test_no_end_of_a_pipe_is_left_open():
    before = len(os.listdir("/proc/self/fd"))
    lines = both_ends()
    assert len(os.listdir("/proc/self/fd")) > before
    del lines
    assert len(os.listdir("/proc/self/fd")) == before


# - offers


def lent_until_read() -> tuple[float, list[float]]:
    """Rank 1 is slow to read; seconds that this rank waits, and what it has got of the other one."""
    group = Group()
    group.reserve_tags(1)
    flat, got = torch.full((2 * NUMEL,), float(group.rank)), torch.empty(NUMEL)
    received = [got if rank != group.rank else None for rank in range(2)]
    pending = group.exchange(flat, received, tag=0, label="exchange")
    if group.rank == 1:
        time.sleep(0.4)
    begin = time.monotonic()
    pending.wait()
    seconds = time.monotonic() - begin
    flat.fill_(-1.0)
    group.exchange_json("both have it", label="meeting")
    return seconds, got.unique().tolist()


def test_memory_is_lent_until_it_was_read(ranks):
    (waited, of_1), (_, of_0) = ranks(2).run(lent_until_read)
    assert waited > 0.2
    assert (of_0, of_1) == ([0.0], [1.0])


def told_in_other_sizes() -> str:
    group = Group(dist.new_group())
    _, told = group._watch.wire.gather_control(torch.zeros(2 + group.rank))
    with pytest.raises(RuntimeError) as raised:
        told.wait()
    return str(raised.value)


def test_what_is_told_in_another_size(ranks):
    assert ranks(2).run(told_in_other_sizes) == [
        "expected 8 bytes from rank 1, got 12",
        "expected 12 bytes from rank 0, got 8",
    ]


# - who is a neighbour


def near_ranks() -> list[bool]:
    return Group()._watch.wire._neighbours.are_near


@pytest.mark.parametrize(("machines", "near"), [(1, [1, 1, 1]), (2, [1, 0, 0]), (4, [0, 0, 0])])
def test_ranks_of_one_machine_are_neighbours(ranks, machines, near):
    by_rank = ranks(4, machines).run(near_ranks)
    assert by_rank[0] == [False, *map(bool, near)]
    assert by_rank[3] == [*map(bool, near[::-1]), False]


def refused(rank: int, what: str) -> tuple[list[bool], str]:
    """A training whose rank ``rank`` is not allowed something among processes."""
    group = dist.new_group()
    with pytest.MonkeyPatch.context() as patched:
        if dist.get_rank() == rank:
            patched.setattr(neighbours, what, lambda *_: None)
        near = Group(group)._watch.wire._neighbours.are_near
    model, optimizer, _ = train(Tied, Tokens(), stage=3, group=group)
    return near, ss.digest(model, optimizer)


@pytest.mark.parametrize("what", ["finds", "open_outlet"])
def test_both_ways_or_not_at_all(ranks, what):
    for near, digest in ranks(2).run(refused, 1, what):
        assert near == [False, False]
        assert digest == digest_alone()


def only_one_pair_refused() -> tuple[list[bool], str]:
    """Rank 1 cannot read rank 2, so that rank 0 alone has everybody near."""
    group, finds_it = dist.new_group(), neighbours.finds
    with pytest.MonkeyPatch.context() as patched:
        if dist.get_rank() == 1:
            tried = iter([True, False])
            patched.setattr(neighbours, "finds", lambda *what: next(tried) and finds_it(*what))
        near = Group(group)._watch.wire._neighbours.are_near
    model, optimizer, _ = train(Tied, Tokens(), stage=3, group=group, leaves=6)
    return near, ss.digest(model, optimizer)


def test_all_ranks_know_who_is_whose_neighbour(ranks):
    nears, digests = zip(*ranks(3).run(only_one_pair_refused), strict=True)
    assert nears == ([False, True, True], [True, False, False], [True, False, False])
    model, optimizer, _ = train(Tied, Tokens(), stage=0, leaves=6)
    assert set(digests) == {ss.digest(model, optimizer)}


def digest_alone() -> str:
    model, optimizer, _ = train(Tied, Tokens(), stage=0)
    return ss.digest(model, optimizer)
