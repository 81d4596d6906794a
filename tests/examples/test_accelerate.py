"""Accelerate: the example alone, and on two ranks under torchrun."""

from tests.examples.running import example, under_torchrun

SIZE = {"steps": 3, "width": 32, "layers": 2, "seed": 0}


def test_two_ranks_give_the_bits_of_one():
    one = example("train_accelerate").train(stage=0, **SIZE)
    two = under_torchrun("train_accelerate", stage=3, **SIZE)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert set(two["stages"].values()) == {3}
    assert one["sha256"] == two["sha256"]
    assert one["tensors"] == two["tensors"]
    assert one["losses"][-1] < one["losses"][0]
