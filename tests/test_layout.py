"""Layouts: slots that do not overlap, runs that partition any interval, a fingerprint that sees every difference."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardstep.layout import ALIGNMENT_NUMEL, BLOCK_NUMEL, Layout, fingerprint, lay_out

shapes = st.lists(st.integers(0, 12), max_size=3).map(tuple)
layouts = st.lists(shapes, min_size=1, max_size=10).map(
    lambda several: lay_out(torch.float32, [(f"p{index}", shape) for index, shape in enumerate(several)])
)
world_sizes = st.integers(1, 9)


@st.composite
def keyed_layouts(draw: st.DrawFn) -> tuple[Layout, list[str]]:
    layout = draw(layouts)
    return layout, draw(st.lists(st.sampled_from("abc"), min_size=len(layout.slots), max_size=len(layout.slots)))


def painted(runs, numel: int) -> torch.Tensor:
    """The key of every element, as a number; fails on overlap or an empty run."""
    canvas = torch.zeros(numel, dtype=torch.uint8)
    for key, start, end in runs:
        assert start < end
        assert not canvas[start:end].any(), "runs overlap"
        canvas[start:end] = ord(key)
    return canvas


@given(layouts)
def test_slots_are_aligned_and_in_order_and_fill_the_space_with_the_gaps(layout):
    covered = torch.zeros(layout.numel, dtype=torch.int8)
    for slot, following in zip(layout.slots, [*layout.slots[1:], None], strict=True):
        assert slot.offset % ALIGNMENT_NUMEL == 0
        assert slot.numel == torch.Size(slot.shape).numel()
        assert following is None or slot.end <= following.offset < slot.end + ALIGNMENT_NUMEL
        covered[slot.offset : slot.end] += 1
    for start, end in layout.gaps:
        assert start < end
        covered[start:end] += 1
    assert (covered == 1).all()


@given(layouts)
def test_the_space_is_the_fewest_whole_blocks(layout):
    assert layout.numel == layout.blocks * BLOCK_NUMEL
    assert layout.blocks == 1 or layout.numel - layout.slots[-1].end < BLOCK_NUMEL + ALIGNMENT_NUMEL


@given(layouts, world_sizes)
def test_shards_are_equal_whole_blocks_and_no_longer_than_needed(layout, world_size):
    shard = layout.shard_numel(world_size)
    assert shard % BLOCK_NUMEL == 0
    assert layout.padded_numel(world_size) == shard * world_size
    assert 0 <= layout.padded_numel(world_size) - layout.numel < world_size * BLOCK_NUMEL


@given(keyed_layouts(), st.data())
def test_runs_partition_any_interval(keyed, data):
    layout, keys = keyed
    start = data.draw(st.integers(0, layout.numel))
    stop = data.draw(st.integers(start, layout.numel))
    runs = list(layout.runs(keys, start, stop))
    canvas = painted(runs, layout.numel)
    assert canvas[start:stop].all()
    assert not canvas[:start].any()
    assert not canvas[stop:].any()
    assert runs == sorted(runs, key=lambda run: run[1])
    for slot, key in zip(layout.slots, keys, strict=True):
        inside = canvas[max(slot.offset, start) : min(slot.end, stop)]
        assert (inside == ord(key)).all()


@given(keyed_layouts(), world_sizes)
def test_runs_of_all_shards_together_are_the_runs_of_one_rank(keyed, world_size):
    layout, keys = keyed
    shard = layout.shard_numel(world_size)
    cut = []
    for rank in range(world_size):
        cut += layout.runs(keys, rank * shard, min((rank + 1) * shard, layout.numel))
    assert all(start % ALIGNMENT_NUMEL == 0 == end % ALIGNMENT_NUMEL for _, start, end in cut)
    assert torch.equal(painted(cut, layout.numel), painted(layout.runs(keys, 0, layout.numel), layout.numel))


def test_neighbours_with_equal_keys_share_a_run():
    layout = lay_out(torch.float32, [(name, (200,)) for name in "abcd"])
    assert list(layout.runs("xxyx", 0, layout.numel)) == [("x", 0, 512), ("y", 512, 768), ("x", 768, 1024)]


@given(layouts, st.data())
def test_the_slot_at_an_element_of_it(layout, data):
    with_elements = [slot for slot in layout.slots if slot.numel]
    if with_elements:
        slot = data.draw(st.sampled_from(with_elements))
        assert layout.slot_at(slot.offset + data.draw(st.integers(0, slot.numel - 1))) == slot


def test_the_fingerprint_sees_every_difference():
    def print_of(unit="u", dtype=torch.float32, first=("a", (2, 3)), second=("b", (4,))):
        return fingerprint([(unit, lay_out(dtype, [first, second]))])

    different = [
        print_of(unit="v"),
        print_of(dtype=torch.bfloat16),
        print_of(first=("c", (2, 3))),
        print_of(first=("a", (3, 2))),
        print_of(first=("b", (4,)), second=("a", (2, 3))),
    ]
    assert print_of() == print_of()
    assert len({print_of(), *different}) == 6
