"""Programs with matrix products: how they are cut into steps, and that the steps compute what the program means."""
# ruff: noqa: F821

import pytest
import torch

from shardstep.optim.muon import muon
from shardstep.rules.backends import reference
from shardstep.rules.backends.llvm import compile_phase
from shardstep.rules.compiled import compile_rule
from shardstep.rules.ir import Product, State, Sweep, Unit, parse_text
from shardstep.rules.language import inline, rule, state, zeros
from shardstep.rules.lower import program_of
from shardstep.rules.passes import compile_truths, cut_steps, stages
from shardstep.rules.view import state_shape
from shardstep.types import Batch, Segment, Update, Whole
from tests.rules.phases import bind, phase

NARROW = """
rule example
%0 = load grad : real element
%1 = bfloat16 %0 : real element
%2 = transpose %1 : real cr
%3 = matmul %1 %2 : real rr
%4 = bfloat16 %3 : real rr
%5 = matmul %4 %1 : real element
%6 = load param : real element
%7 = sub %6 %5 : real element
store param %7
"""


def test_the_example_of_the_pass():
    steps = cut_steps(parse_text(NARROW))
    assert [type(step) for step in steps.all] == [Sweep, Product, Product, Sweep]
    assert steps.middle == (Product(1, False, 1, True, 4), Product(4, False, 1, False, 5))
    assert (steps.inward, steps.outward) == ((1,), (5,))
    assert [steps.buffers[n].narrow for n in (1, 4, 5)] == [True, True, False]
    assert steps.buffers[4].extent == "rr"


def steps_of(defined, rows, columns, **hypers):
    program = program_of(defined)
    given = {**defined.hyperparameters, "step": 2, "grad_scale": 1.0, "rows": rows, "columns": columns, **hypers}
    return cut_steps(stages(program, compile_truths(program)(given), torch.float32)[-1][1])


@pytest.mark.parametrize(("rows", "columns", "extent"), [(3, 8, "rr"), (8, 3, "cc")])
def test_muon_works_on_the_smaller_side_and_moves_two_bytes_each_way(rows, columns, extent):
    steps = steps_of(muon, rows, columns, ns_steps=4)
    made = [steps.buffers[step.result].extent for step in steps.middle]
    assert made == [extent, extent, "element"] * 4
    assert all(isinstance(step, Product) and steps.buffers[step.result].narrow for step in steps.middle)
    assert [len(side) for side in (steps.inward, steps.outward)] == [1, 1]
    assert all(steps.buffers[number].narrow for number in (*steps.inward, *steps.outward))
    stored = [name for step in steps.head for name, _ in step.phase.body.stores if name == "momentum_buffer"]
    assert stored == ["momentum_buffer"], "as soon as it is there"


def test_without_products_nothing_moves():
    steps = steps_of(muon, 3, 8, ns_steps=0)
    assert not steps.middle
    assert not steps.inward
    assert not steps.outward


@inline
def newton(x):
    return 1.5 * x - 0.5 * x @ x.T @ x


@rule
def wide_products(param, grad, total=zeros, *, lr=0.1):
    """In the compute dtype, with narrow operands beside wide ones."""
    x = grad / norm(grad)
    for _ in range(2):
        x = newton(x)
    total = total + x
    return param - lr * (bfloat16(total) @ (x.T @ x)), total


@rule
def every_kind(param, grad, swapped=state("param"), other=zeros, *, step, lr=0.1, flag=True):
    """Turns, sums of all extents in and around the middle, states that change places, masks, one number for all."""
    gram = grad @ grad.T
    even = gram + 0.5 * gram.T + max_abs(gram)
    scale = where(sum(even) > 0, norm(even), 1.0) + norm(grad)
    direction = (even / scale) @ grad
    direction = where(direction > mean(direction), direction, -grad)
    size = norm(direction) + norm(param)
    back = (grad.T @ gram).T
    param = param - lr / step * direction / (size + max_abs(swapped)) + 0.001 * back / max_abs(back)
    return param, other if flag else swapped, swapped + lr


@rule
def scalar_out(param, grad, *, lr=0.5):
    """A number of the middle meets elements that products never saw."""
    gram = grad @ grad.T
    moved = param * (1 + lr / (1 + norm(gram))) + (gram / (norm(gram) + norm(grad))) @ (param + grad)
    return moved - grad / (1 + max_abs(gram))


@rule
def kept(param, grad, *, lr=0.5):
    """What goes into the products is needed after them."""
    x = bfloat16(param - grad)
    y = (x @ x.T) @ x / norm(x @ x.T)
    return param - lr * where(x * y > 0, y, x)


@rule
def squares(
    param,
    grad,
    left=state(shape="row_pair"),
    right=state(1.0, shape="column_pair"),
    before=state(shape="row_pair"),
    turned=state(shape="row_pair", dtype="bfloat16"),
    *,
    step,
    lr=0.1,
):
    """States that the middle reads where they are: by products, by passes before and after they are stored, swapped."""
    gram = grad @ grad.T
    shifted = left / max_abs(gram) + 0.5 * identity(gram)
    total = left + gram
    right = 0.5 * right + grad.T @ grad / max_abs(right)
    if step % 2 == 0:
        turned = bfloat16((shifted @ left).T / (norm(left) + norm(shifted)))
    update = (shifted + turned / max_abs(turned)) @ grad @ right / norm(right)
    return param - lr * update / (norm(update) + norm(param)), before, right, total / norm(total), turned


RULES = [wide_products, every_kind, scalar_out, kept, squares, muon]


def arrays_of(defined, shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    arrays = [State("param"), State("grad"), *defined.declared]
    shapes = {array.name: state_shape(array.shape, shape) for array in arrays}
    dtypes = {array.name: torch.bfloat16 if array.dtype else dtype for array in arrays}
    return {
        name: torch.randn(own, generator=generator, dtype=torch.float64).to(dtypes[name])
        for name, own in shapes.items()
    }


def states_of(defined, arrays):
    """Those of elements, flat, and the others."""
    elements = {name: arrays[name].view(-1) for name in defined.states if name not in defined.tensor_states}
    return elements, {name: arrays[name] for name in defined.tensor_states}


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (130, 70), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("defined", RULES, ids=lambda defined: defined.name)
def test_steps_compute_what_the_program_means(defined, dtype, shape):
    arrays, hypers = arrays_of(defined, shape, dtype), {**defined.hyperparameters, "lr": 0.25}
    low = torch.empty(shape, dtype=torch.bfloat16).view(-1)
    want = reference_of(defined, arrays, hypers, dtype)
    state, squares = states_of(defined, arrays)
    segment = Segment(0, 2, arrays["param"].view(-1), arrays["grad"].view(-1), state, low, 0.5, 384, shape)
    segment.tensor_state = squares
    compile_rule(defined).update(Batch([segment], [Update(0, 2, shape)], lambda sums, _: sums), [hypers])
    close = {"rtol": 2e-2, "atol": 2e-3} if defined is muon else {"rtol": 1e-4, "atol": 1e-5}
    for name, expected in want.items():
        torch.testing.assert_close(arrays[name], expected, **close)
    assert torch.equal(low.view(shape), arrays["param"].to(torch.bfloat16))


def reference_of(defined, arrays, hypers, dtype):
    rows, columns = arrays["param"].shape[-2:]
    given = {**hypers, "step": 2, "grad_scale": 0.5, "rows": rows, "columns": columns}
    program = program_of(defined)
    program = stages(program, compile_truths(program)(given), dtype)[-1][1]
    return reference.run_whole(program, arrays, given, compute=dtype, offset=384)


class Halves:
    """An owner of one tensor whose pieces are two segments of one process."""

    def __init__(self, whole, at):
        self.tensors, self.owned, self.at, self.dtypes = [whole], [0], at, []

    def gather(self, pieces, dtypes):
        assert [[piece.dtype for piece in own] for own in pieces] == [dtypes[0], dtypes[0]]
        return [[torch.cat(both) for both in zip(*pieces, strict=True)]]

    def scatter(self, wholes, dtypes):
        assert [[whole.dtype for whole in own] for own in wholes] == list(dtypes)
        return [[whole[: self.at] for whole in wholes[0]], [whole[self.at :] for whole in wholes[0]]]


def combined(partials, _):
    return [[torch.cat(parts) for parts in zip(*partials, strict=True)]] * 2


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (48, 48)], ids=str)
@pytest.mark.parametrize("defined", RULES, ids=lambda defined: defined.name)
def test_parts_that_meet_at_an_owner_have_the_bits_of_the_whole(defined, shape):
    hypers, numel, at = {**defined.hyperparameters, "lr": 0.25}, shape[0] * shape[1], 1024
    whole, cut = arrays_of(defined, shape, torch.float32), arrays_of(defined, shape, torch.float32)

    def segment(arrays, part):
        state = {name: values[part] for name, values in states_of(defined, arrays)[0].items()}
        param, grad = (arrays[name].view(-1)[part] for name in ("param", "grad"))
        return Segment(0, 2, param, grad, state, None, 0.5, part.start, shape)

    run = compile_rule(defined).update
    alone = segment(whole, slice(0, numel))
    alone.tensor_state = states_of(defined, whole)[1]
    run(Batch([alone], [Update(0, 2, shape)], lambda sums, _: sums), [hypers])
    owner = Halves(Whole(0, 2, shape, torch.float32, 0.5, 0, states_of(defined, cut)[1]), at)
    run(
        Batch([segment(cut, slice(0, at)), segment(cut, slice(at, numel))], [Update(0, 2, shape)], combined, owner),
        [hypers],
    )
    for name, values in whole.items():
        assert torch.equal(cut[name], values), name


@rule
def whole_numbers(param, grad, *, lr=1.0):
    """Every product and sum is exact, so all back ends agree to the bit."""
    return param - lr * (bfloat16(grad @ grad.T) @ grad)


def test_where_products_are_exact_the_bits_are_those_of_the_reference():
    arrays = {"param": torch.arange(35.0).view(5, 7), "grad": (torch.arange(35.0).view(5, 7) % 5) - 2}
    want = reference_of(whole_numbers, arrays, {"lr": 1.0}, torch.float32)["param"]
    segment = Segment(0, 2, arrays["param"].view(-1), arrays["grad"].view(-1), {}, None, 0.5, 0, (5, 7))
    compile_rule(whole_numbers).update(Batch([segment], [Update(0, 2, (5, 7))], lambda sums, _: sums), [{"lr": 1.0}])
    assert torch.equal(arrays["param"], want)


def test_states_of_squares_are_read_and_stored_in_the_middle_without_copies():
    steps = steps_of(squares, 4, 3, step=3)
    assert [len(side) for side in (steps.inward, steps.outward)] == [1, 1]
    assert sum(isinstance(step, Unit) for step in steps.middle) == 1
    passes = [step for step in steps.middle if isinstance(step, Sweep)]
    stores = [(name, step.extent) for step in passes for name, _ in step.phase.body.stores]
    assert {name: extent for name, extent in stores if name in squares.states} == {
        "left": "rr",
        "right": "cc",
        "before": "rr",
    }
    loaded = [n for n in steps.buffers if steps.program.instructions[n].operation == "load"]
    assert not loaded, "only products need a state in a buffer"


def test_a_state_with_the_name_of_a_buffer():
    @rule
    def clash(param, grad, b1=zeros):
        b1 = b1 + grad
        return param - bfloat16(grad) @ (grad.T @ grad), b1

    steps = steps_of(clash, 4, 3)
    assert not {buffer.name for buffer in steps.buffers.values()} & {"param", "grad", "b1"}


def test_rows_and_columns_beside_products_stay_on_the_reference():
    @rule
    def both(param, grad):
        return param - row_mean(grad) * (grad @ (grad.T @ grad))

    assert not compile_rule(both).is_shardable
    assert compile_rule(both).locality == "matrix"


def test_llvm_rounds_to_bfloat16_as_the_reference():
    values = torch.tensor([1.0, 1.00390625, -3.4e38, 1e-40, float("inf"), float("nan"), 0.0, -0.0])
    kernel_phase = phase("rule r\n%0 = load grad : real element\n%1 = bfloat16 %0 : real element\nstore param %1\n")
    got, want = ({"param": torch.zeros(8), "grad": values.clone()} for _ in range(2))
    binding = bind(kernel_phase)
    compile_phase(kernel_phase, binding)(got, ())
    reference.compile_phase(kernel_phase, binding)(want, ())
    assert torch.equal(got["param"].view(torch.int32), want["param"].view(torch.int32))
