"""The meaning of the language: each operation against rational arithmetic, reductions against loops, any cut."""

import math
import operator
import random
from contextlib import nullcontext
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from shardstep.errors import RuleError
from shardstep.rules import ir
from shardstep.rules.backends import blocks, reference
from shardstep.rules.backends.reference import compile_phase, run_whole
from shardstep.rules.binding import Binding
from shardstep.rules.scalars import compile_scalars
from shardstep.rules.view import state_shape
from tests.rules.exact import root, rounded, same, special_values
from tests.rules.programs import SCALARS, phase_of, random_array, random_arrays, random_program, same_bits

COMPUTE = (torch.float32, torch.float64)
NUMBERS = (0.9, -1e-3, 2.5)
HYPERS = dict(zip(SCALARS, NUMBERS, strict=True))


@pytest.fixture(autouse=True)
def _silence():
    with np.errstate(all="ignore"):
        yield


def parse(body, states=(), hypers=()):
    """A program from its lines without numbers at the left; kinds and shapes are written out."""
    lines = [f"state {state}" for state in states] + [f"hyper {hyper}" for hyper in hypers]
    instructions = [line for line in body.strip().splitlines() if not line.strip().startswith("store")]
    lines += [f"%{i} = {line.strip()}" for i, line in enumerate(instructions)]
    lines += [line.strip() for line in body.strip().splitlines() if line.strip().startswith("store")]
    return ir.verify(ir.parse_text("\n".join(["rule r", *lines])))


def run_one(operation, operands, dtype):
    """One operation on arrays called param, grad, c."""
    program = ir.Program("one", (ir.State("c"),), (), (), ())
    build = ir.Builder(program.shapes)
    numbers = [build.load(name) for name in ("param", "grad", "c")[: len(operands)]]
    result = build.emit(operation, *numbers)
    if build.type_of(result).kind == "bool":
        result = build.emit("where", result, build.constant(1.0), build.constant(0.0))
    program = ir.verify(program.with_instructions(build.instructions, [("param", result)]))
    arrays = {name: torch.from_numpy(a) for name, a in zip(("param", "grad", "c"), operands, strict=False)}
    return run_whole(program, arrays, {}, compute=dtype)["param"].numpy()


def exact_quotient(a, b):
    return Fraction(a) / Fraction(b)


EXACT = {
    "add": lambda a, b: Fraction(a) + Fraction(b),
    "sub": lambda a, b: Fraction(a) - Fraction(b),
    "mul": lambda a, b: Fraction(a) * Fraction(b),
    "div": exact_quotient,
}


@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("operation", list(EXACT))
def test_arithmetic_is_rounded_once(operation, dtype):
    values = special_values(dtype)
    a, b = (grid.reshape(-1).copy() for grid in np.meshgrid(values, values))
    for x, y, got in zip(a.tolist(), b.tolist(), run_one(operation, [a, b], dtype).tolist(), strict=True):
        if operation == "div" and y == 0:
            want = math.nan if x == 0 else math.copysign(math.inf, math.copysign(1, x) * math.copysign(1, y))
            assert same(got, want)
            continue
        want = EXACT[operation](x, y)
        if want:
            assert same(got, rounded(want, dtype)), (x, y)
        else:
            assert same(got, {"add": x + y, "sub": x - y, "mul": x * y}.get(operation) or got)
            assert got == 0


@pytest.mark.parametrize("dtype", COMPUTE)
def test_fma_is_rounded_once(dtype):
    values = random_array(300, dtype, 4).numpy()
    rows = [values, np.roll(values, 1).copy(), np.roll(values, 2).copy()]
    for x, y, z, got in zip(*(row.tolist() for row in (*rows, run_one("fma", rows, dtype))), strict=True):
        if all(map(math.isfinite, (x, y, z))):
            assert got == rounded(Fraction(x) * Fraction(y) + Fraction(z), dtype)


@pytest.mark.parametrize("dtype", COMPUTE)
def test_the_square_root_is_rounded_once(dtype):
    values = np.abs(random_array(400, dtype, 5).numpy())
    for x, got in zip(values.tolist(), run_one("sqrt", [values], dtype).tolist(), strict=True):
        if math.isfinite(x) and x > 0:
            assert got == root(x, dtype)
    negative = run_one("sqrt", [np.array([-1.0, -0.0, math.inf], values.dtype)], dtype)
    assert [same(a, b) for a, b in zip(negative.tolist(), [math.nan, -0.0, math.inf], strict=True)] == [True] * 3


def larger(a, b):
    return math.nan if math.isnan(a) or math.isnan(b) else (max(a, b) or 0.0)


def smaller(a, b):
    return math.nan if math.isnan(a) or math.isnan(b) else (min(a, b) or 0.0)


WITH_SPECIAL = {
    "minimum": smaller,
    "maximum": larger,
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
}


@pytest.mark.parametrize("dtype", COMPUTE)
@pytest.mark.parametrize("operation", list(WITH_SPECIAL))
def test_comparisons_and_extremes_of_nan_zeros_and_infinities(operation, dtype):
    values = np.concatenate([special_values(dtype), np.array([math.nan, math.inf, -math.inf])])
    values = values.astype(special_values(dtype).dtype)
    a, b = (grid.reshape(-1).copy() for grid in np.meshgrid(values, values))
    for x, y, got in zip(a.tolist(), b.tolist(), run_one(operation, [a, b], dtype).tolist(), strict=True):
        assert same(got, float(WITH_SPECIAL[operation](x, y))), (x, y)


@pytest.mark.parametrize("dtype", COMPUTE)
def test_signs(dtype):
    values = np.array([3.0, -1e-40, 0.0, -0.0, math.nan, -math.inf]).astype(special_values(dtype).dtype)
    wanted = {
        "sign": [1.0, -1.0, 0.0, 0.0, 0.0, -1.0],
        "neg": [-3.0, -values[1], -0.0, 0.0, math.nan, math.inf],
        "abs": [3.0, -values[1], 0.0, 0.0, math.nan, math.inf],
    }
    for operation, want in wanted.items():
        got = run_one(operation, [values], dtype).tolist()
        assert all(same(x, float(y)) for x, y in zip(got, want, strict=True)), (operation, got)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.float64, 64)])
def test_words_wrap_around(dtype, width):
    program = parse(
        """load grad : real element
        bits %0 : word element
        const 3000000019 : word uniform
        word_mul %1 %2 : word element
        word_add %3 %2 : word element
        word_shl 7 %4 : word element
        word_shr 3 %5 : word element
        word_xor %6 %1 : word element
        word_sub %2 %7 : word element
        word_and %8 %4 : word element
        word_or %9 %6 : word element
        from_bits %10 : real element
        store param %11"""
    )
    values = special_values(dtype)
    got = run_whole(program, {"param": torch.from_numpy(values), "grad": torch.from_numpy(values)}, {}, compute=dtype)
    unsigned, mask = np.dtype(f"u{width // 8}"), 2**width - 1
    for x, result in zip(values.view(unsigned).tolist(), got["param"].numpy().view(unsigned).tolist(), strict=True):
        k = 3000000019
        added = (x * k + k) & mask
        mixed = ((added << 7) & mask) >> 3
        want = (((k - (mixed ^ x)) & mask) & added) | mixed
        assert result == want or np.isnan(np.array([want], unsigned).view(values.dtype)[0])


@pytest.mark.parametrize("dtype", COMPUTE)
def test_the_index_is_the_global_position_and_wraps_in_float32(dtype):
    program = parse("index : word element\nfrom_bits %0 : real element\nstore param %1")
    param = torch.zeros(3, 2, dtype=dtype)
    got = run_whole(program, {"param": param}, {}, compute=dtype, offset=2**32 - 2)["param"].numpy().reshape(-1)
    words = got.view(np.uint32 if dtype == torch.float32 else np.uint64).tolist()
    limit = 2**32 if dtype == torch.float32 else 2**64
    assert words == [(2**32 - 2 + i) % limit for i in range(6)]


def test_uniform_values_are_float64_until_they_meet_an_element():
    program = parse(
        """hyper lr : real uniform
        const 1.0 : real uniform
        add %0 %1 : real uniform
        sub %2 %1 : real uniform
        load grad : real element
        mul %3 %4 : real element
        store param %5""",
        hypers=["lr"],
    )
    grad = torch.ones(2)
    got = run_whole(program, {"param": grad, "grad": grad}, {"lr": 1e-9}, compute=torch.float32)["param"]
    assert got.tolist() == [float(np.float32((1e-9 + 1.0) - 1.0))] * 2


def test_the_host_has_the_functions_of_the_math_module():
    program = parse(
        """hyper betas 1 : real uniform
        hyper step : real uniform
        pow %0 %1 : real uniform
        exp %2 : real uniform
        log %3 : real uniform
        tanh %4 : real uniform
        rsqrt %5 : real uniform
        store state %6
        """,
        states=["state tensor = 0.0"],
        hypers=["betas 2", "step"],
    )
    arrays = {"param": torch.ones(2, dtype=torch.float64), "state": torch.zeros((), dtype=torch.float64)}
    hypers = {"betas": (0.9, 0.999), "step": torch.tensor(3.0)}
    got = run_whole(program, arrays, hypers, compute=torch.float64)["state"]
    assert got.item() == 1 / math.sqrt(math.tanh(math.log(math.exp(math.pow(0.999, 3)))))


def test_tensor_values_follow_ieee_where_python_would_raise():
    program = parse(
        """load grad : real element
        sum %0 : real tensor
        log %1 : real tensor
        exp %0 : real element
        div %1 %1 : real tensor
        store log %2
        store ratio %4""",
        states=["log tensor = 0.0", "ratio tensor = 0.0"],
    )
    zeros = torch.zeros(2)
    arrays = {"param": zeros, "grad": zeros, "log": torch.zeros(1), "ratio": torch.zeros(1)}
    got = run_whole(program, arrays, {}, compute=torch.float32)
    assert got["log"].tolist() == [-math.inf]
    assert math.isnan(got["ratio"].item())


ONE_OVER_DECAY = """hyper decay : real uniform
    const 0.0 : real uniform
    eq %0 %1 : bool uniform
    const 1.0 : real uniform
    div %3 %0 : real uniform @ 12:4
    choose %2 %3 %4 : real uniform
    load grad : real element
    mul %6 {factor} : real element
    store param %7"""


def test_a_per_step_scalar_without_a_value_is_refused_with_its_line():
    grad = torch.ones(2)
    program = parse(ONE_OVER_DECAY.format(factor="%4"), hypers=["decay"])
    with pytest.raises(RuleError, match=r"line 12.*1 / decay to have a value, got a division by zero with decay=0.0"):
        run_whole(program, {"param": grad, "grad": grad}, {"decay": 0.0}, compute=torch.float32)


def test_a_branch_that_is_not_chosen_may_have_none():
    grad = torch.full((2,), 3.0)
    program = parse(ONE_OVER_DECAY.format(factor="%5"), hypers=["decay"])
    for decay, want in ((0.0, 3.0), (0.5, 6.0)):
        got = run_whole(program, {"param": grad, "grad": grad}, {"decay": decay}, compute=torch.float32)
        assert got["param"].tolist() == [want] * 2


@pytest.mark.parametrize("decay", [math.inf, 0.0])
@pytest.mark.parametrize("run", ["whole", "scalars"])
def test_the_host_and_the_reference_refuse_the_same_scalars(run, decay):
    """For 0.0 the branch that divides is not taken; infinity minus infinity is no number."""
    program = parse(
        """hyper decay : real uniform
        const 0.0 : real uniform
        eq %0 %1 : bool uniform
        div %0 %0 : real uniform
        where %2 %1 %3 : real uniform
        sub %0 %0 : real uniform
        add %4 %5 : real uniform
        load grad : real element
        mul %7 %6 : real element
        store param %8""",
        hypers=["decay"],
    )
    grad = torch.ones(1)
    expectation = nullcontext() if decay == 0.0 else pytest.raises(RuleError, match=r"decay.* no number \(NaN\)")
    with expectation:
        if run == "whole":
            run_whole(program, {"param": grad, "grad": grad}, {"decay": decay}, compute=torch.float32)
        else:
            compile_scalars(program, (6,))({"decay": decay}, {})


def test_a_hyper_parameter_that_is_no_number_is_named():
    grad = torch.ones(1)
    program = parse(ONE_OVER_DECAY.format(factor="%5"), hypers=["decay"])
    with pytest.raises(RuleError, match="a number for the hyper-parameter decay, got decay=None"):
        run_whole(program, {"param": grad, "grad": grad}, {"decay": None}, compute=torch.float32)


def wide_spread(numel):
    """Numbers whose sum depends on the order."""
    rng = np.random.default_rng(1)
    return rng.standard_normal(numel) * 10.0 ** rng.integers(-6, 6, numel)


def sum_by_hand(values, offset):
    """The definition, in loops."""
    lanes = {}
    for i, value in enumerate(values):
        lane = lanes.setdefault((offset + i) // 1024, [0.0] * 16)
        lane[(offset + i) % 16] += float(value)
    partials = []
    for block in sorted(lanes):
        lane = lanes[block]
        for width in (8, 4, 2, 1):
            lane = [lane[i] + lane[i + width] for i in range(width)]
        partials.append(lane[0])
    return partials


def tree_by_hand(parts):
    while len(parts) > 1:
        pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


@pytest.mark.parametrize("offset", [0, 5, 1023, 3000])
@pytest.mark.parametrize("numel", [1, 16, 1024, 5000])
def test_a_sum_goes_by_lanes_blocks_and_a_tree(numel, offset):
    values = wide_spread(numel)
    partials = blocks.partials("sum", values, offset)
    assert partials.tolist() == sum_by_hand(values, offset)
    assert blocks.reduce("sum", values, offset) == tree_by_hand(sum_by_hand(values, offset))


@pytest.mark.parametrize("count", range(1, 12))
def test_the_tree_pairs_neighbours_and_moves_an_odd_last_one_up(count):
    for parts in wide_spread(50 * count).reshape(50, count):
        assert blocks.combine("sum", parts) == tree_by_hand(parts.tolist())


def test_sums_and_maxima_of_nothing_of_zeros_and_of_nan():
    assert blocks.partials("sum", np.zeros(0), 7).shape == (0,)
    assert same(float(blocks.reduce("sum", np.array([-0.0, -0.0]))), 0.0)
    assert same(float(blocks.reduce("max", np.array([-0.0, -1.0]))), 0.0)
    assert blocks.reduce("max", np.array([-3.0, -2.0]), 5) == -2.0
    assert math.isnan(blocks.reduce("max", np.array([1.0, math.nan, 2.0])))


def line_by_hand(terms):
    """The sum of a row or a column: of its terms as multiples of the grid."""
    if not all(map(math.isfinite, terms)):
        return math.nan
    largest = max(map(abs, terms))
    exponent, bits = math.frexp(largest)[1], (len(terms) - 1).bit_length()
    power = max(exponent + max(bits - 1, 1), -1022) if largest else -1022
    if power > 1022:
        return math.nan
    grid = Fraction(2) ** (power - 52)
    return float(sum(round(Fraction(term) / grid) for term in terms) * grid)


LINES = """load grad : real element
row_sum %0 : real row
column_sum %0 : real column
abs %0 : real element
row_max %3 : real row
column_max %3 : real column
row_total %0 %4 : real row
column_total %0 %5 : real column
store rows %1
store columns %2
store rows_again %6
store columns_again %7"""


def sums_of_lines(grad, offset=0):
    states = [f"{line}s{what} {line} = 0.0" for line in ("row", "column") for what in ("", "_again")]
    arrays = {name.split()[0]: torch.zeros(state_shape(name.split()[1], grad.shape)).to(grad.dtype) for name in states}
    arrays |= {"param": grad, "grad": grad}
    return run_whole(parse(LINES, states=states), arrays, {}, compute=grad.dtype, offset=offset)


@pytest.mark.parametrize("dtype", COMPUTE, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (9,), (5, 7), (3, 2500), (40, 1), (2, 3, 4), (2, 2, 3, 3)], ids=str)
def test_sums_of_rows_and_columns(shape, dtype):
    grad = torch.from_numpy(wide_spread(math.prod(shape))).to(dtype).reshape(shape)
    got = sums_of_lines(grad)
    cube = grad.double().reshape(-1, *(1, 1, *shape)[-2:])
    rows = [line_by_hand(row) for matrix in cube.tolist() for row in matrix]
    columns = [line_by_hand(column) for matrix in cube.mT.tolist() for column in matrix]
    for name, want in (("rows", rows), ("columns", columns)):
        assert got[name].shape == state_shape("row" if name == "rows" else "column", shape)
        want = torch.tensor(want, dtype=torch.float64).to(dtype)
        assert same_bits(got[name].reshape(-1), want)
        assert same_bits(got[f"{name}_again"].reshape(-1), want)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_sums_over_nothing_are_zero(shape):
    assert not any(values.any() for values in sums_of_lines(torch.zeros(shape)).values())


def test_sums_of_rows_at_the_ends_of_the_formats():
    info = torch.finfo(torch.float64)
    least = info.tiny * info.eps
    rows = [[least] * 4, [math.inf, 1.0, 0.0, 0.0], [math.nan, 1.0, 0.0, 0.0], [info.max, 1.0, 0.0, 0.0]]
    rows += [[2.0**1019, 2.0**1019, 0.0, 0.0], [-0.0] * 4, [1.0, least, -1.0, 2.0**-51]]
    got = sums_of_lines(torch.tensor(rows, dtype=torch.float64))["rows"].view(-1).tolist()
    assert got[0] == 4 * least
    assert all(math.isnan(value) for value in got[1:4])
    assert got[4] == 2.0**1020
    assert same(got[5], 0.0)
    assert got[6] == 0.0  # the grid is 2^-50: half of it goes to the even multiple
    big = torch.full((1, 1000), torch.finfo(torch.float32).max)
    assert sums_of_lines(big)["rows"].item() == math.inf  # the sum is finite, and rounds so
    assert sums_of_lines(big / 1024)["rows"].item() == pytest.approx(float(big[0, 0]) * 1000 / 1024)


def test_float32_sums_of_rows_are_rounded_once_or_nearly():
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(50, 3000, generator=generator) ** 2
    exact = [float(sum(map(Fraction, row))) for row in grad.double().tolist()]
    got = sums_of_lines(grad)["rows"].view(-1)
    assert (got.double() - torch.tensor(exact).double()).abs().max() <= 2.0**-24 * max(exact) * 1.001


@pytest.mark.parametrize("offset", [0, 5, 100, 333, 1000])
def test_a_sum_of_elements_goes_by_global_positions_and_a_sum_of_rows_by_their_own(offset):
    program = parse(
        """load grad : real element
        load r : real row
        sum %0 : real tensor
        sum %1 : real tensor
        store a %2
        store b %3""",
        states=["r row = 0.0", "a tensor = 0.0", "b tensor = 0.0"],
    )
    grad, one = torch.from_numpy(wide_spread(2500 * 3)).reshape(2500, 3), torch.zeros(1, dtype=torch.float64)
    arrays = {"param": grad, "grad": grad, "r": grad[:, 0], "a": one, "b": one}
    got = run_whole(program, arrays, {}, compute=torch.float64, offset=offset)
    assert got["a"].item() == tree_by_hand(sum_by_hand(grad.reshape(-1).tolist(), offset))
    assert got["b"].item() == tree_by_hand(sum_by_hand(grad[:, 0].tolist(), 0))


def test_rows_and_columns_join_to_elements_and_fill_arrays():
    program = parse(
        """load r : real row
        load c : real column
        mul %0 %1 : real element
        add %0 %0 : real row
        sum %0 : real tensor
        numel : real tensor
        rows : real tensor
        columns : real tensor
        fma %6 %7 %5 : real tensor
        store param %2
        store m %3
        store total %4
        store counts %8""",
        states=["r row = 0.0", "c column = 0.0", "m element = 0.0", "total tensor = 0.0", "counts tensor = 0.0"],
    )
    r, c = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(2, 2, 1), torch.arange(6.0).view(2, 1, 3)
    arrays = {"param": torch.zeros(2, 2, 3), "r": r, "c": c, "m": torch.zeros(2, 2, 3)}
    arrays |= {"total": torch.zeros(()), "counts": torch.zeros(1)}
    got = run_whole(program, arrays, {}, compute=torch.float32)
    assert got["param"].tolist() == (r * c).tolist()
    assert got["m"].tolist() == (2 * r).expand(2, 2, 3).tolist()
    assert got["total"].shape == ()
    assert got["total"].item() == 10.0
    assert got["counts"].tolist() == [2 * 3 + 12.0]


def test_what_rows_have_in_each_column_is_one_number_for_each_matrix():
    program = parse(
        """load r : real row
        column_sum %0 : real column
        mul %0 %1 : real element
        store param %2""",
        states=["r row = 0.0"],
    )
    r = torch.arange(6.0).view(2, 3, 1)
    got = run_whole(program, {"param": torch.zeros(2, 3, 4), "r": r}, {}, compute=torch.float32)["param"]
    assert got.tolist() == (r * r.sum(dim=1, keepdim=True)).expand(2, 3, 4).tolist()


def test_matrix_products_and_transposes():
    program = parse(
        """load grad : real element
        transpose %0 : real cr
        matmul %0 %1 : real rr
        matmul %2 %0 : real element
        sum %2 : real tensor
        mul %3 %4 : real element
        store param %5"""
    )
    grad = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    got = run_whole(program, {"param": grad, "grad": grad}, {}, compute=torch.float32)["param"]
    g = grad.double()
    square = (g @ g.mT).float().double()
    want = (square @ g).float() * square.sum().float()
    assert torch.allclose(got, want, rtol=1e-6)


def test_new_values_leave_the_old_arrays_alone_and_keep_their_dtype():
    program = parse(
        """load param : real element
        load grad : real element
        add %0 %1 : real element
        store param %2
        store m %2""",
        states=["m element = 0.0 bfloat16"],
    )
    arrays = {"param": torch.ones(4), "grad": torch.full((4,), 1e-3).half(), "m": torch.zeros(4, dtype=torch.bfloat16)}
    kept = {name: array.clone() for name, array in arrays.items()}
    got = run_whole(program, arrays, {}, compute=torch.float32)
    assert all(torch.equal(arrays[name], kept[name]) for name in arrays)
    assert torch.equal(got["param"], 1 + kept["grad"].float())
    assert got["m"].dtype == torch.bfloat16
    assert torch.equal(got["m"], got["param"].bfloat16())


def kernel_of(program, compute, low=None, **stored):
    dtypes = tuple((name, stored.get(name, compute)) for name in program.shapes)
    return compile_phase(phase_of(program), Binding(compute, dtypes, low))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("seed", range(25))
def test_a_phase_is_the_whole_program_however_it_is_cut(seed, compute, monkeypatch):
    monkeypatch.setattr(reference, "TILE", 2048)
    program = random_program(random.Random(seed), elementary=seed % 2 == 0, reductions=True)
    arrays = random_arrays(program, 5003, compute, seed)
    offset = 777
    want = run_whole(program, arrays, HYPERS, compute=compute, offset=offset)
    kernel = kernel_of(program, compute)
    whole = {name: array.clone() for name, array in arrays.items()}
    partials = kernel(whole, NUMBERS, offset=offset)
    cuts = [0, 1, 3 * 1024 - offset, 5003]
    pieces = {name: array.clone() for name, array in arrays.items()}
    parts = []
    for begin, end in pairwise(cuts):
        part = kernel({n: a[begin:end] for n, a in pieces.items()}, NUMBERS, offset=offset + begin)
        parts.append(part)
    assert torch.equal(pieces["grad"].isnan(), arrays["grad"].isnan())
    for name, array in want.items():
        assert same_bits(whole[name], array), name
        assert same_bits(pieces[name], array), name
    for (number, _), total, *cut in zip(phase_of(program).sums, partials, *parts, strict=True):
        assert total.dtype == torch.float64
        assert total.shape == (6,)
        assert same_bits(torch.cat([total[3:]]), cut[2])
        values = run_argument(program, number, arrays, compute, offset)
        operation = program.instructions[number].operation
        combined = blocks.reduce(operation, values, offset)
        assert same(float(blocks.combine(operation, total.numpy())), float(combined))


def run_argument(program, number, arrays, compute, offset):
    argument = program.instructions[number].arguments[0]
    only = program.with_instructions(program.instructions, [("param", argument)])
    return run_whole(only, arrays, HYPERS, compute=compute, offset=offset)["param"].numpy()


LION = """load param : real element
    load grad : real element
    load exp_avg : real element
    hyper s0 : real uniform
    sub %1 %2 : real element
    fma %3 %4 %2 : real element
    sign %5 : real element
    hyper s1 : real uniform
    mul %6 %7 : real element
    add %0 %8 : real element
    store param %9
    store exp_avg %5"""


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", COMPUTE)
def test_stored_dtypes_are_converted_on_load_and_rounded_once_on_store(compute, state, grad, low):
    program = parse(LION, states=["exp_avg element = 0.0"], hypers=SCALARS)
    stored = {"exp_avg": state or compute, "grad": grad}
    arrays = {name: random_array(999, stored.get(name, compute), i) for i, name in enumerate(program.shapes)}
    wide = {name: array.to(compute) for name, array in arrays.items()}
    want = run_whole(program, wide, HYPERS, compute=compute)
    copy = torch.empty(999, dtype=low)
    kernel_of(program, compute, low, **stored)(arrays, NUMBERS, low=copy)
    assert same_bits(arrays["param"], want["param"])
    for got, new in ((arrays["exp_avg"], want["exp_avg"]), (copy, want["param"])):
        if got.dtype == torch.bfloat16 and compute == torch.float64:
            finite = [(x, y) for x, y in zip(new.tolist(), got.tolist(), strict=True) if math.isfinite(x)]
            assert all(y == rounded(Fraction(x), torch.bfloat16) for x, y in finite)
        else:
            halves = torch.from_numpy(new.numpy().astype(np.float16)) if got.dtype == torch.float16 else None
            assert same_bits(got, new.to(got.dtype) if halves is None else halves)
        if got.element_size() == 2:
            words = got.view(torch.int16)[got.isnan()]
            assert set(words.tolist()) == {{torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[got.dtype]}


def test_arrays_that_change_places_are_read_before_they_are_written():
    program = parse(
        """load param : real element
        load m : real element
        bits %1 : word element
        from_bits %2 : real element
        store param %3
        store m %0""",
        states=["m element = 0.0"],
    )
    arrays = {"param": torch.ones(5), "grad": torch.zeros(5), "m": torch.full((5,), 2.0)}
    kernel_of(program, torch.float32)(arrays, ())
    assert arrays["param"].tolist() == [2.0] * 5
    assert arrays["m"].tolist() == [1.0] * 5


def test_an_empty_array_and_an_array_of_one():
    program = parse("load grad : real element\nsum %0 : real tensor\nstore param %0")
    for numel in (0, 1):
        arrays = {"param": torch.zeros(numel), "grad": torch.ones(numel)}
        (partials,) = kernel_of(program, torch.float32)(arrays, ())
        assert partials.tolist() == [1.0] * numel
        assert arrays["param"].tolist() == [1.0] * numel


def test_denormals_are_kept_even_where_the_thread_flushes_them():
    program = parse(
        "load grad : real element\nhyper s0 : real uniform\nmul %0 %1 : real element\nstore param %2", hypers=SCALARS
    )
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        arrays = {
            "param": torch.zeros(2),
            "grad": torch.tensor([0x00000100, 0x00800000], dtype=torch.int32).view(torch.float32),
        }
        whole = run_whole(program, arrays, {"s0": 0.5}, compute=torch.float32)["param"]
        kernel_of(program, torch.float32)(arrays, (0.5,))
        still = torch.tensor([1e-30]) * torch.tensor([1e-10])
    finally:
        torch.set_flush_denormal(False)
    assert whole.view(torch.int32).tolist() == [0x80, 0x00400000]
    assert arrays["param"].view(torch.int32).tolist() == [0x80, 0x00400000]
    assert still.item() == 0.0, "the thread's own setting is put back"
