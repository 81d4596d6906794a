"""The fixed tree: one order of additions for any number of leaves, however they were grouped on their way."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardstep.sharding.memory import Ledger
from shardstep.sharding.reduce import _TILE_NUMEL, Tree

NUMEL = 33
counts = st.integers(1, 21)
leaf_dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def random_leaves(count: int, dtype: torch.dtype, numel: int = NUMEL) -> list[Tensor]:
    """Of very different magnitudes, so that another order of additions gives other bits."""
    generator = torch.Generator().manual_seed(count)
    scales = 10.0 ** torch.randint(-3, 4, (count, 1), generator=generator)
    return list((torch.randn(count, numel, generator=generator) * scales).to(dtype))


def fixed_sum(leaves: list[Tensor]) -> Tensor:
    """The definition: the largest complete subtree on the left, and the same again on the right."""
    if len(leaves) == 1:
        return leaves[0].float()
    left = 1 << ((len(leaves) - 1).bit_length() - 1)
    return fixed_sum(leaves[:left]) + fixed_sum(leaves[left:])


def new_tree() -> tuple[Tree, Ledger]:
    ledger = Ledger(torch.device("cpu"))
    return Tree(ledger, torch.float32), ledger


def taken(ledger: Ledger, values: Tensor) -> Tensor:
    return ledger.take("gradients", values.numel(), values.dtype).copy_(values)


@st.composite
def groupings(draw: st.DrawFn, count: int) -> list[tuple[int, int]]:
    """A cut of ``count`` leaves into complete subtrees (first leaf, level)."""
    subtrees, first = [], 0
    while first < count:
        fitting = [level for level in range(5) if first % (1 << level) == 0 and first + (1 << level) <= count]
        level = draw(st.sampled_from(fitting))
        subtrees.append((first, level))
        first += 1 << level
    return subtrees


def test_the_order_of_additions_shows_in_the_bits():
    leaves = random_leaves(8, torch.float32)
    assert not torch.equal(fixed_sum(leaves), sum(leaves[1:], leaves[0]))
    assert not torch.equal(fixed_sum(leaves), fixed_sum(leaves[::2] + leaves[1::2]))


@settings(deadline=None)
@given(counts, leaf_dtypes)
def test_pushed_leaf_by_leaf_the_total_is_the_fixed_sum(count, dtype):
    leaves = random_leaves(count, dtype)
    tree, ledger = new_tree()
    for pushed, leaf in enumerate(leaves, 1):
        tree.push(taken(ledger, leaf), home="tree")
        assert len(tree) == pushed.bit_count()
    total = tree.total().values
    assert torch.equal(total.float(), fixed_sum(leaves))
    assert len(tree) == 1


@settings(deadline=None)
@given(st.data(), counts, leaf_dtypes)
def test_any_grouping_into_complete_subtrees_gives_the_same_total(data, count, dtype):
    leaves = random_leaves(count, dtype)
    tree, ledger = new_tree()
    for first, level in data.draw(groupings(count)):
        part = fixed_sum(leaves[first : first + (1 << level)]) if level else leaves[first]
        tree.push(taken(ledger, part), home="tree", level=level)
    assert torch.equal(tree.total().values.float(), fixed_sum(leaves))


@settings(deadline=None)
@given(st.data(), counts, leaf_dtypes)
def test_passing_memory_is_read_and_never_written(data, count, dtype):
    leaves = random_leaves(count, dtype)
    before = [leaf.clone() for leaf in leaves]
    tree, ledger = new_tree()
    for leaf in leaves:
        home = data.draw(st.sampled_from(["tree", "passing"]))
        tree.push(taken(ledger, leaf) if home == "tree" else leaf, home=home)
    assert torch.equal(tree.total().values.float(), fixed_sum(before))
    assert all(map(torch.equal, leaves, before))


@settings(deadline=None)
@given(counts, leaf_dtypes, st.sampled_from(["kept", "passing"]))
def test_a_settled_tree_outlives_the_memory_that_was_lent_to_it(count, dtype, home):
    leaves = random_leaves(count, dtype)
    tree, _ = new_tree()
    shared = torch.empty(NUMEL, dtype=dtype)
    for leaf in leaves:
        tree.settle()
        tree.push(shared.copy_(leaf), home=home)
    tree.settle()
    shared.fill_(torch.nan)
    assert torch.equal(tree.total().values.float(), fixed_sum(leaves))


@settings(deadline=None)
@given(st.data(), counts, leaf_dtypes)
def test_memory_from_anywhere_gives_the_same_total(data, count, dtype):
    leaves = random_leaves(count, dtype)
    tree, ledger = new_tree()
    for leaf in leaves:
        home = data.draw(st.sampled_from(["tree", "kept", "passing"]))
        tree.push(taken(ledger, leaf) if home == "tree" else leaf.clone(), home=home)
        if data.draw(st.booleans()):
            tree.settle()
    assert torch.equal(tree.total().values.float(), fixed_sum(leaves))


def test_a_sum_in_kept_memory_takes_no_other():
    leaves = random_leaves(2, torch.float32)
    tree, ledger = new_tree()
    tree.push(taken(ledger, leaves[0]), home="tree")
    kept = leaves[1].clone()
    tree.push(kept, home="kept")
    assert tree.total().values is kept
    assert ledger.live.gradients == 0
    assert torch.equal(kept, fixed_sum(leaves))


@settings(deadline=None)
@given(st.data(), counts, leaf_dtypes, st.sampled_from(["leave", "total", "hand over"]))
def test_what_was_taken_is_given_back(data, count, dtype, ending):
    tree, ledger = new_tree()
    for leaf in random_leaves(count, dtype):
        home = data.draw(st.sampled_from(["tree", "kept", "passing"]))
        tree.push(taken(ledger, leaf) if home == "tree" else leaf, home=home)
        if data.draw(st.booleans()):
            tree.settle()
    if ending == "total":
        tree.total()
    if ending == "hand over":
        total = tree.hand_over()
        assert ledger.live.gradients == (total.values.nbytes if total.home == "tree" else 0)
        tree.push(total.values, home=total.home, level=total.level)
    tree.clear()
    assert len(tree) == 0
    assert ledger.live.gradients == 0


@settings(deadline=None)
@given(counts)
def test_no_more_buffers_than_the_logarithm_of_the_leaves(count):
    tree, ledger = new_tree()
    for leaf in random_leaves(count, torch.float32):
        tree.push(taken(ledger, leaf), home="tree")
    assert ledger.peak.gradients <= (count.bit_length() + 1) * NUMEL * 4


@settings(deadline=None)
@given(st.integers(2, 5))
def test_widening_is_exact_across_tiles(count):
    leaves = random_leaves(count, torch.bfloat16, numel=2 * _TILE_NUMEL + 5)
    tree, ledger = new_tree()
    for leaf in leaves:
        tree.push(taken(ledger, leaf), home="tree")
    assert torch.equal(tree.total().values, fixed_sum(leaves))
