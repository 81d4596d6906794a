"""A zoo of models: what people build and train, small. Each one is a line of the table at the end.

Everything is a function of the number of a micro-batch, so that any number of ranks deals with the same ones.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

WIDTH = 6


def batch(number: int, width: int = WIDTH) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


class Block(nn.Module):
    """Two layers and a residual; ``frozen`` names parts that are not trained."""

    def __init__(self, width: int = WIDTH, frozen: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 5), nn.Linear(5, width)
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Blocks between a stem and a head; ``order`` says which are called, and in which order."""

    def __init__(self, block: Callable[[], nn.Module] = Block, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 2)
        self.order: Callable[[int], tuple[int, ...]] = lambda number: tuple(range(blocks))

    def trunk(self, x: Tensor, number: int) -> Tensor:
        x = self.stem(x)
        for index in self.order(number):
            x = self.run(self.blocks[index], x)
        return x

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def forward(self, x: Tensor, number: int = 0) -> Any:
        return self.head(self.trunk(x, number)).square().mean()


def plain(model: nn.Module, number: int) -> Tensor:
    return model(batch(number), number)


def backward_of_loss(model: nn.Module, number: int) -> None:
    plain(model, number).backward()


def ordered(order: Callable[[int], tuple[int, ...]]) -> Stack:
    model = Stack()
    model.order = order
    return model


# - whose parameters are used where


class TiedAcross(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks[3].down.bias = self.stem.bias


class External(Stack):
    """The root uses a block's matrix, and a block uses an earlier and a later one's."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        self.blocks[1].others = [self.blocks[0], self.blocks[3]]

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if block is self.blocks[1]:
            x = _Borrowing.forward(block, x, self.detached)
        return block(x)

    def trunk(self, x: Tensor, number: int) -> Tensor:
        return F.linear(
            torch.tanh(F.linear(super().trunk(x, number), self.blocks[2].up.weight)), self.blocks[0].down.weight
        )


class _Borrowing:
    @staticmethod
    def forward(block: Any, x: Tensor, detached: bool) -> Tensor:
        before, after = (other.up.weight.detach() if detached else other.up.weight for other in block.others)
        return x + (x @ before.T) @ after


class BorrowingBlock(Block):
    """A block that uses another one's parameters in its own forward, and sometimes gives a view of its own out."""

    lender: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.lender is not None:
            (lender,) = self.lender
            x = x + F.linear(torch.sin(F.linear(x, lender.up.weight, lender.up.bias)), lender.down.weight)
        return x


def borrowing() -> Stack:
    """The first block uses the last one's parameters and the third uses the second's."""
    model = Stack(BorrowingBlock)
    model.blocks[0].lender, model.blocks[2].lender = (model.blocks[3],), (model.blocks[1],)
    return model


class Lender(nn.Module):
    """Returns parameters: one as it is, and a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner(x), self.scale, self.inner.weight[:2]


class ReturnsParameters(Stack):
    def __init__(self) -> None:
        super().__init__(Lender, 3)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        y, scale, rows = block(x)
        return (x @ rows.T).sum(-1, keepdim=True) + torch.tanh(y) * scale


# - what is trained, and what is used


def mixed_frozen() -> Stack:
    """The last use in backward is of a frozen matrix; one block is frozen altogether."""
    model = Stack(partial(Block, frozen=("up.weight", "down.bias")))
    return _freeze(model, "blocks.1")


def frozen_but_last() -> Stack:
    return _freeze(Stack(), "stem", "blocks")


def frozen_first() -> Stack:
    """As low-rank adapters have it: little is trained, everything is passed."""
    model = Stack(partial(Block, frozen=("up.weight", "up.bias", "down.weight")))
    return _freeze(model, "stem", "head")


def _freeze(model: Stack, *names: str) -> Stack:
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


class Unused(Stack):
    """A block's second layer and a part of the root that are used by some micro-batches, and some that never are."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.now_and_then = nn.Linear(3, 3), nn.Linear(WIDTH, WIDTH)
        self.blocks[1].never = nn.Parameter(torch.ones(3))

    def trunk(self, x: Tensor, number: int) -> Tensor:
        x = super().trunk(x, number)
        return x + self.now_and_then(x) if number % 3 == 1 else x


class Empty(Stack):
    """Units without parameters, zero-element parameters, and units smaller than the number of ranks."""

    def __init__(self) -> None:
        super().__init__(Scale, 5)
        self.blocks[1], self.blocks[3] = nn.Tanh(), Scale(empty=True)


class Scale(nn.Module):
    def __init__(self, empty: bool = False) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.scale = nn.Parameter(torch.ones(1))
        self.nothing = nn.Parameter(torch.ones(0, 3))
        if empty:
            self.scale = self.register_parameter("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) + self.nothing.sum()
        return x * self.scale if self.scale is not None else x


class Nested(Stack):
    """Units inside units, one of them used by two."""

    def __init__(self) -> None:
        super().__init__(Outer, 3)
        self.blocks[2].inner = self.blocks[0].inner


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.tanh(self.inner(self.first(x))))


class Recursive(nn.Module):
    """A unit that calls itself, as often as the micro-batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = torch.tanh(self.inner(x))
        return self(x, depth - 1) + self.inner(x) if depth else x


def normed_weights() -> Stack:
    def block() -> Block:
        block = Block()
        weight_norm(block.up)
        return block

    return Stack(block)


# - outputs


@dataclass
class Record:
    hidden: list[Tensor]
    note: str = "text"


class Named(NamedTuple):
    hidden: Tensor
    nothing: None = None


class Ordered(OrderedDict[str, Any]):
    """As Hugging Face's ModelOutput."""

    @property
    def hidden(self) -> Any:
        return self["hidden"]


class Hidden:
    __slots__ = ("deep",)

    def __init__(self, x: Tensor) -> None:
        self.deep = Holder(x)

    @property
    def hidden(self) -> Tensor:
        return self.deep.value


class Holder:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Closed:
    """Nobody can look into it."""

    def __init__(self, x: Tensor) -> None:
        self.get = lambda: x

    @property
    def hidden(self) -> Tensor:
        return self.get()


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda x: {"hidden": x, "mask": torch.ones(2, dtype=torch.bool), "n": 3},
    "dataclass": lambda x: Record([x, x]),
    "named tuple": Named,
    "tuple": lambda x: (x, (None, [x])),
    "mapping": lambda x: Ordered(hidden=x),
    "object": Hidden,
    "closure": Closed,
}


class Caching(Stack):
    """Gives out what blocks compute inside them, as caches of attention and hidden states are given out."""

    def __init__(self) -> None:
        super().__init__(CachingBlock)

    def forward(self, x: Tensor, number: int = 0) -> tuple[Tensor, list[Tensor]]:
        self._cache: list[Tensor] = []
        return super().forward(x, number), self._cache

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x, self._cache)


class CachingBlock(Block):
    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        inside = torch.tanh(self.up(x))
        cache.append(inside)
        return x + self.down(inside)


def loss_of_cached(model: nn.Module, number: int) -> Tensor:
    loss, cache = model(batch(number), number)
    return loss + cache[1].sin().mean()


HIDDEN = ("object", "closure")
"""Those that DistributedDataParallel does not look into."""


class Outputs(nn.Module):
    """Blocks and the model return what is not a tensor, and the loss is computed outside."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wrapped(kind) for _ in range(3))
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = unpacked(self.kind, block(x))
        return OUTPUTS[self.kind](x * x * self.scale)


class Wrapped(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = Block(), kind
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Any:
        return OUTPUTS[self.kind](self.inner(x) * self.scale)


def unpacked(kind: str, output: Any) -> Tensor:
    if kind == "tuple":
        return output[1][1][0]
    if kind == "dict":
        return output["hidden"]
    return output.hidden[1] if kind == "dataclass" else output.hidden


def loss_of_output(kind: str, model: nn.Module, number: int) -> Tensor:
    return (unpacked(kind, model(batch(number))) - 1).square().mean()


class Router(Block):
    """Leaves a loss in an attribute, after its output was made."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.extra = [F.linear(y, self.up.weight).square().mean(), y.sin().mean() * self.down.bias.sum()]
        return y


def loss_with_extras(model: Any, number: int) -> Tensor:
    return plain(model, number) + sum(extra for block in model.blocks for extra in block.extra)


# - checkpointed activations


class Checkpointed(Stack):
    """Around units or inside them; what the first one is given needs no gradient."""

    def __init__(self, reentrant: bool, around: bool, block: Callable[[], nn.Module] | None = None) -> None:
        inner = Block if around else partial(CheckpointedBlock, reentrant)
        super().__init__(block or inner)
        self.reentrant, self.around = reentrant, around

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=self.reentrant) if self.around else block(x)


class CheckpointedBlock(Block):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(checkpoint(lambda y: torch.tanh(self.up(y)), x, use_reentrant=self.reentrant))


class CheckpointedTwice(Stack):
    """Checkpoints in checkpoints, over parts of the root as well."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(partial(CheckpointedBlock, reentrant))
        self.reentrant = reentrant

    def forward(self, x: Tensor, number: int = 0) -> Tensor:
        x = self.stem(x)
        x = checkpoint(lambda y: self.blocks[1](self.blocks[0](y)), x, use_reentrant=self.reentrant)
        x = checkpoint(lambda y: self.head(self.blocks[3](self.blocks[2](y))), x, use_reentrant=self.reentrant)
        return x.square().mean()


def frozen_checkpointed(reentrant: bool) -> Checkpointed:
    model = Checkpointed(reentrant, True, partial(Block, frozen=("up.weight", "up.bias", "down.weight")))
    model.blocks[2].requires_grad_(False)
    return model


def checkpoint_of_all(reentrant: bool, model: nn.Module, number: int) -> Tensor:
    """Two whole models' forwards in one loss, each in a checkpoint."""
    x = batch(number).requires_grad_()
    return checkpoint(model, x, use_reentrant=reentrant) + checkpoint(model, x * 2, use_reentrant=reentrant)


# - how losses are made


def summed_forwards(model: nn.Module, number: int) -> Tensor:
    return model(batch(number), number) + model(batch(number) * 2, number).square()


def penalised(model: Any, number: int) -> Tensor:
    """The norm of the gradient with respect to the input is a part of the loss."""
    x = batch(number).requires_grad_()
    loss = model(x, number)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + (grad.norm() - 1).square()


def attacked(model: Any, number: int) -> Tensor:
    """A step along the gradient with respect to the input, which is no part of the loss."""
    x = batch(number).requires_grad_()
    (grad,) = torch.autograd.grad(model(x, number), x)
    return plain(model, number) + model(x.detach() + 0.1 * grad.sign(), number)


def looked_at(model: nn.Module, number: int) -> Tensor:
    """Evaluations before, between and after, some of them with gradients that nobody uses."""
    model(batch(number + 7), number)
    loss = plain(model, number)
    model.eval()
    with torch.no_grad():
        plain(model, number + 1)
    with torch.inference_mode():
        plain(model, number + 2)
    model.train()
    return loss


def caught(model: Any, number: int) -> Tensor:
    """An exception in the middle of a forward, which the loop goes on from."""
    order, model.order = model.order, lambda number: (0, 1, 99)
    try:
        plain(model, number)
        raise AssertionError("the forward should have failed")
    except IndexError:
        model.order = order
    return plain(model, number)


def by_parts(model: Any, number: int) -> Tensor:
    """Modules of the model, called by themselves."""
    x = model.stem(batch(number))
    for block in model.blocks:
        x = block(x)
    return model.head(x).square().mean()


class Method(Stack):
    """A method of its own that reads parameters of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def encode(self, x: Tensor) -> Tensor:
        return self.trunk(x * self.scale, 0) * self.scale


def encoded(model: Any, number: int) -> Tensor:
    return (model.encode(batch(number)) * 3).square().mean() + plain(model, number)


def summed(loss: Callable[[Any, int], Tensor], model: nn.Module, number: int) -> None:
    loss(model, number).backward()


class Trunk(Stack):
    def forward(self, x: Tensor, number: int = 0) -> Tensor:
        return self.head(self.trunk(x, number))


def backward_of_a_vector(model: nn.Module, number: int) -> None:
    out = model(batch(number))
    out.backward(torch.cos(out.detach()) / 2)


def backward_twice(model: nn.Module, number: int) -> None:
    out = model(batch(number))
    out.square().mean().backward(retain_graph=True)
    out.sin().mean().backward()


# - the table


@dataclass(frozen=True)
class Entry:
    """A model, and what backward pass a micro-batch makes. ``passes``: how many it makes; each counts as a micro-batch
    in the mean, and their order among the ranks', so the bits, depends on how many there are.

    ``exact``: the bytes on the wire are the formula's (all parameters get gradients, in declared order). ``ddp``:
    torch's own DistributedDataParallel can train it.
    """

    make: Callable[[], nn.Module]
    backward: Callable[[Any, int], None] = backward_of_loss
    units: Any = "blocks.*"
    passes: int = 1
    exact: bool = False
    ddp: bool = True
    entries: tuple[str, ...] = ()
    prefetch: int = 1


ZOO: dict[str, Entry] = {
    "plain": Entry(Stack, exact=True),
    "tied across units": Entry(TiedAcross),
    "parameters of other units, used by the root": Entry(External),
    "parameters of other units, used without gradients": Entry(partial(External, detached=True)),
    "parameters of other units, used by units": Entry(borrowing),
    "parameters returned from modules": Entry(ReturnsParameters, prefetch=0),
    "weights made of parameters": Entry(normed_weights),
    "frozen and trained in one unit": Entry(mixed_frozen),
    "frozen but for the head": Entry(frozen_but_last),
    "frozen but for a little in each unit": Entry(frozen_first),
    "unused now and then, and always": Entry(Unused),
    "no parameters, no elements, fewer than ranks": Entry(Empty),
    "called several times": Entry(partial(ordered, lambda number: (0, 1, 0, 2, 0, 3, 3))),
    "in another order each time": Entry(partial(ordered, lambda number: tuple((k * 3 + number) % 4 for k in range(4)))),
    "skipped": Entry(partial(ordered, lambda number: ((0, 1, 3), (2, 1), (3,), (1, 0, 2, 3))[number % 4])),
    "nested units": Entry(Nested, units=["blocks.*", "blocks.*.inner"]),
    "units that call themselves": Entry(partial(Stack, Recursive, 3)),
    **{
        f"outputs: {kind}": Entry(
            partial(Outputs, kind), partial(summed, partial(loss_of_output, kind)), ddp=kind not in HIDDEN
        )
        for kind in OUTPUTS
    },
    "outputs: from inside blocks": Entry(Caching, partial(summed, loss_of_cached), exact=True),
    "losses in attributes": Entry(partial(Stack, Router), partial(summed, loss_with_extras), ddp=False, prefetch=0),
    **{
        f"checkpoints {'around' if around else 'inside'} units, {'' if reentrant else 'not '}reentrant": Entry(
            partial(Checkpointed, reentrant, around), exact=not reentrant or not around, ddp=not reentrant
        )
        for reentrant in (True, False)
        for around in (True, False)
    },
    **{
        f"checkpoints of {what}, {'' if reentrant else 'not '}reentrant": Entry(make, backward, ddp=not reentrant)
        for reentrant in (True, False)
        for what, make, backward in (
            ("frozen parts", partial(frozen_checkpointed, reentrant), partial(summed, plain)),
            ("checkpoints", partial(CheckpointedTwice, reentrant), partial(summed, plain)),
            ("the model", Stack, partial(summed, partial(checkpoint_of_all, reentrant))),
        )
    },
    "sum of two forwards": Entry(Stack, partial(summed, summed_forwards), ddp=False),
    "gradient penalty": Entry(Stack, partial(summed, penalised), ddp=False),
    "gradient of the input": Entry(Stack, partial(summed, attacked), ddp=False),
    "evaluations in between": Entry(Stack, partial(summed, looked_at), ddp=False),
    "an exception in forward": Entry(Stack, partial(summed, caught), ddp=False),
    "modules called by themselves": Entry(Stack, partial(summed, by_parts), ddp=False),
    "another method": Entry(Method, partial(summed, encoded), ddp=False, entries=("encode",)),
    "backward of a vector": Entry(Trunk, backward_of_a_vector, exact=True),
    "backward twice": Entry(Trunk, backward_twice, passes=2, ddp=False),
}
