"""What rules become: the text of their programs, and that it computes what the function itself computes in Python."""
# ruff: noqa: F821

import itertools
import types
from pathlib import Path

import numpy as np
import pytest

from shardstep.optim.adam import adamw
from shardstep.rules.ir import Place, parse_text, to_text
from shardstep.rules.language import WORDS, Inline, Rule, inline, rule, state, zeros
from shardstep.rules.locality import is_by_tensor, locality
from shardstep.rules.lower import program_of
from tests.rules import elsewhere
from tests.rules.examples import adafactor, lamb, lion, muon, sgd
from tests.rules.passes.plain_evaluator import bfloat16

EXAMPLES = [adamw, lion, sgd, lamb, adafactor, muon]
LOWERED = Path(__file__).parent / "lowered"
SHAPES = {"element": (3, 5), "row": (3, 1), "column": (1, 5), "rr": (3, 3), "cc": (5, 5), "tensor": ()}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda r: r.name)
def test_the_program_is_the_one_on_file(example):
    text = to_text(program_of(example))
    assert text == (LOWERED / f"{example.name}.txt").read_text(encoding="utf-8")
    assert parse_text(text) == program_of(example)


# The function itself, in numpy: float64, rows as (r, 1), columns as (1, c).

NUMPY = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "abs": np.abs,
    "sign": np.sign,
    "bfloat16": bfloat16,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "clip": lambda x, low, high: np.minimum(np.maximum(x, low), high),
    "lerp": lambda start, end, weight: weight * (end - start) + start,
    "fma": lambda x, y, z: x * y + z,
    "where": np.where,
    "sum": np.sum,
    "mean": np.mean,
    "norm": lambda x: np.sqrt(np.sum(x * x)),
    "max_abs": lambda x: np.max(np.abs(x)),
    "row_mean": lambda x: np.mean(x, axis=1, keepdims=True),
    "col_mean": lambda x: np.mean(x, axis=0, keepdims=True),
    "identity": lambda x: np.eye(len(x)),
}


def in_python(definition):
    """The function of a rule or an inline function, with numpy for the language's functions."""
    function = definition.function

    def callable_(found):
        return in_python(found) if isinstance(found, Rule | Inline) and found is not definition else found

    used = set(function.__code__.co_names)
    scope = {name: callable_(found) for name, found in function.__globals__.items() if name in used} | NUMPY
    cells = tuple(types.CellType(callable_(cell.cell_contents)) for cell in function.__closure__ or ())
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


OPERATIONS = {
    **{name: NUMPY[name] for name in "sqrt rsqrt exp log tanh abs sign bfloat16 minimum maximum fma where sum".split()},
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "pow": np.power, "neg": np.negative},
    **{"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal},
    **{"ne": np.not_equal, "and": np.logical_and, "or": np.logical_or, "not": np.logical_not, "choose": np.where},
    "max": np.max,
    "row_sum": lambda x: np.sum(x, axis=1, keepdims=True),
    "column_sum": lambda x: np.sum(x, axis=0, keepdims=True),
    "matmul": np.matmul,
    "transpose": np.transpose,
    "identity": NUMPY["identity"],
    "mod": np.mod,
    "numel": lambda: 15.0,
    "rows": lambda: 3.0,
    "columns": lambda: 5.0,
}


def in_ir(program, arrays, hypers):
    """The new arrays, in order; all of them, also those that are not stored."""
    values = []
    for line in program.instructions:
        if line.operation == "const":
            values.append(line.attributes[0])
        elif line.operation == "load":
            values.append(arrays[line.attributes[0]])
        elif line.operation == "hyper":
            name, *index = line.attributes
            values.append(hypers[name][index[0]] if index else hypers[name])
        else:
            values.append(OPERATIONS[line.operation](*(values[a] for a in line.arguments)))
    stores = dict(program.stores)
    return [values[stores[n]] if n in stores else arrays[n] for n in arrays if n != "grad"]


def arrays_of(example, seed=0):
    chance = np.random.default_rng(seed)
    shapes = {"param": "element", "grad": "element", **{s.name: s.shape for s in example.declared}}
    return {name: np.abs(chance.normal(size=SHAPES[shape])) + 0.1 for name, shape in shapes.items()}


def agree(example, **hypers):
    arrays = arrays_of(example)
    arrays["grad"] = arrays["grad"] - 0.5
    hypers = {**example.hyperparameters, **hypers}
    program = program_of(example)
    want = in_python(example)(*arrays.values(), **{k: v for k, v in hypers.items() if k != "step" or has_step(example)})
    want = want if isinstance(want, tuple) else (want,)
    for got, expected in zip(in_ir(program, arrays, {"step": 3, **hypers}), want, strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(expected, np.shape(got)), rtol=1e-11, atol=1e-300)


def has_step(example):
    return "step" in example.function.__code__.co_varnames


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda r: r.name)
def test_the_program_computes_what_the_function_says(example):
    agree(example, step=3)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], [False, True], [0.0, 0.1], [0.0, 0.9], [1, 4])))
def test_branches_become_choices(flags):
    nesterov, maximize, weight_decay, momentum, step = flags
    agree(sgd, nesterov=nesterov, maximize=maximize, weight_decay=weight_decay, momentum=momentum, step=step)


@rule
def every_word(param, grad, m=zeros, *, lr=0.5, betas=(0.1, 0.2), flag=True):
    m = fma(m, lr, exp(-grad)) + log(param) * tanh(grad) - abs(grad)
    m = m + clip(grad, -0.1, 0.2) + lerp(m, grad, lr) + rsqrt(m * m) + sign(grad) + bfloat16(grad)
    scale = sum(m) / mean(grad) + max_abs(param) * norm(m)
    lines = row_mean(param) * col_mean(grad) + mean(row_mean(m)) + mean(col_mean(m)) + mean(m @ m.T) + mean(m.T @ m)
    lines = lines + (identity(param @ param.T) - 0.5 * identity(m @ m.T)) @ m
    lr2 = sqrt(lr) if lr > betas[0] + betas[-1] and not (flag or lr >= 2) else lr
    near = where(grad < -0.2, 1.0, where(param <= 0.5, 2.0, where(param == grad, 3.0, where(m != m, 4.0, 5.0))))
    return minimum(param, -lr2 * +m) + near * maximum(grad, m), lines + scale


@rule
def powers(param, grad):
    total = param**0 + param**1 + param**2 + param**3 + param**4 + param**0.5 + param**1.5 + 2.0**param
    return total + param**-1 + param**-2 + param**-3 + param**-4 + grad**3.0 + param**grad


def test_every_function_of_the_language_is_what_it_is_called():
    for flag in (True, False):
        agree(every_word, flag=flag)
    agree(every_word, lr=0.25, betas=(0.2, 0.1))
    agree(powers)
    used = set(every_word.function.__code__.co_names)
    assert used >= set(WORDS)


@rule
def squares(param, grad, left=state(shape="row_pair"), right=state(1.0, shape="column_pair"), *, step, every=2):
    left = left + grad @ grad.T
    if (step - 1) % every == 0:
        right = 0.5 * right + grad.T @ grad + 7 % 4 * identity(right)
    return param - left @ grad @ right, left, right


@pytest.mark.parametrize("step", [1, 2, 3])
def test_states_of_square_matrices(step):
    agree(squares, step=step)
    assert parse_text(to_text(program_of(squares))) == program_of(squares)
    assert [(s.name, s.shape) for s in squares.stored(left="bfloat16").declared] == [("left", "rr"), ("right", "cc")]


def test_a_state_of_a_square_matrix_needs_it_whole():
    @rule
    def counting(param, grad, left=state(shape="row_pair")):
        return param - grad, left * 0 + 1

    @rule
    def setting(param, grad, left=state(shape="row_pair"), *, lr=0.1):
        return param - lr * grad, lr

    line = counting.function.__code__.co_firstlineno + 2
    assert locality(program_of(counting)) == ("matrix", f"load left in line {line} needs the whole matrix in one place")
    assert locality(program_of(setting)) == ("matrix", "store left needs the whole matrix in one place")


def operations(defined):
    return [line.operation for line in program_of(defined).instructions if line.operation not in ("load", "hyper")]


def body(defined):
    return [line for line in to_text(program_of(defined)).splitlines() if line.startswith(("%", "store"))]


def test_powers_are_multiplications_in_a_fixed_order():
    assert operations(powers)[:6] == ["const", "add", "mul", "add", "mul", "mul"]

    @rule
    def fourth(param, grad):
        return 1 + param**-4

    assert body(fourth) == [
        "%0 = load param : real element",
        "%1 = mul %0 %0 : real element",
        "%2 = mul %1 %1 : real element",
        "%3 = const 1.0 : real uniform",
        "%4 = div %3 %2 : real element",
        "%5 = const 1.0 : real uniform",
        "%6 = add %5 %4 : real element",
        "store param %6",
    ]


def test_a_power_of_per_step_numbers_is_always_pow():
    @rule
    def per_step(param, grad, *, lr=0.1):
        return param - lr**2 * grad

    assert operations(per_step) == ["const", "pow", "mul", "sub"]


def test_truth_values_of_elements_are_combined_one_by_one():
    @rule
    def logic(param, grad):
        return where(param > 0 and not grad < 0 or param == 1, param, grad)  # noqa: RUF021

    assert [o for o in operations(logic) if o != "const"] == ["gt", "lt", "not", "and", "eq", "or", "where"]


def test_literals_are_computed_and_negative_zero_is_kept():
    @rule
    def literals(param, grad):
        return param + (2 * 3 - 1 / 4) + -0.0 + -2 * grad

    constants = [line.attributes[0] for line in program_of(literals).instructions if line.operation == "const"]
    assert [repr(c) for c in constants] == ["5.75", "-0.0", "-2.0"]


def test_branches_that_differ_in_the_sign_of_zero_only_are_kept_apart():
    @rule
    def signs(param, grad, *, flag=False):
        return param * (0.0 if flag else -0.0) + (1.0 if flag else 1.0)  # noqa: RUF034

    assert [line for line in operations(signs) if line == "choose"] == ["choose"]


def test_a_name_of_one_branch_may_be_used_in_that_branch():
    @rule
    def branches(param, grad, *, flag=False, other=True):
        if flag and not other:
            half = grad / 2
            param = param - half
        elif other:
            param = param + grad
        return param

    for flag, other in itertools.product([False, True], repeat=2):
        agree(branches, flag=flag, other=other)


def test_loops_count_and_index_and_tuples_unpack():
    rounds = 3
    weights = (1.0, 2.0, 4.0)
    pairs = ((1.0, 2.0), (3.0, 4.0))

    @rule
    def loops(param, grad, *, betas=(0.5, 0.25, 0.125)):
        for i in range(rounds):
            param = param + weights[i] * betas[i] * grad + i
        for i in range(4, 0, -2):
            (a, b) = pairs[i - 3] if i == 4 else pairs[0]
            param = param * a + b / i
        for _ in range(0):
            param = grad
        return param

    agree(loops)


def test_functions_return_several_values_and_take_names_and_defaults():
    @inline
    def both(x, y=2.0, *, scale=(1.0, 3.0)):
        total = x + y
        return total * scale[0], total * scale[1]

    @rule
    def calls(param, grad):
        first, second = both(param, grad)
        third, _fourth = both(y=grad, x=first, scale=(second, 1.0))
        return third + both(grad)[1]

    @inline
    def shadowed(param, grad):
        param = param * grad
        return param

    @rule
    def scopes(param, grad):
        other = shadowed(grad, param)
        return param - other

    agree(calls)
    agree(scopes)
    assert body(scopes) == [
        "%0 = load grad : real element",
        "%1 = load param : real element",
        "%2 = mul %0 %1 : real element",
        "%3 = sub %1 %2 : real element",
        "store param %3",
    ]


def test_a_rule_may_call_another_rule():
    @rule
    def decayed_lion(param, grad, exp_avg=zeros, count=state(shape="tensor"), *, lr=1e-4, betas=(0.9, 0.99)):
        param, exp_avg = lion(param * (1 - lr), grad, exp_avg, lr=lr, betas=betas)
        return param, exp_avg, count + 1

    agree(decayed_lion, lr=0.3)
    assert ["weight_decay" in line for line in body(decayed_lion)].count(True) == 0


def test_a_state_returned_as_it_was_is_not_stored():
    @rule
    def anchored(param, grad, anchor=state("param", dtype="bfloat16"), *, lr=0.1):
        return param - lr * (grad + (param - anchor)), anchor

    program = program_of(anchored)
    assert [name for name, _ in program.stores] == ["param"]
    assert to_text(program).splitlines()[1] == "state anchor element = param bfloat16"


def test_instructions_know_where_they_were_written():
    first = lion.function.__code__.co_firstlineno
    program = program_of(lion)
    assert program.instructions[8].operation == "sign"
    assert program.instructions[8].place == Place(first + 2, 13)
    assert all(line.place and first < line.place.line < first + 6 for line in program.instructions)


def test_what_comes_from_another_file_is_placed_where_it_is_called():
    @rule
    def local(param, grad):
        return param - elsewhere.halved(grad)

    line = local.function.__code__.co_firstlineno + 2
    assert {i.place.line for i in program_of(local).instructions} == {line}
    assert "const 0.5" in to_text(program_of(local))


@pytest.mark.parametrize(
    ("example", "found", "said"),
    [
        (lion, "elementwise", "every operation"),
        (lamb, "reduced", "sum in line {} needs all elements"),
        (adafactor, "factored", "row_sum in line {} needs whole rows"),
        (muon, "matrix", "transpose in line {} needs the whole matrix"),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_locality_names_the_operation_and_the_line(example, found, said):
    got, reason = locality(program_of(example))
    assert got == found
    start = {"lamb": ("size, change", lamb), "adafactor": ("row = lerp", adafactor), "muon": ("square = x", muon)}
    if example.name in start:
        text = Path(example.function.__code__.co_filename).read_text(encoding="utf-8").splitlines()
        line = next(n for n, source in enumerate(text, 1) if source.strip().startswith(start[example.name][0]))
        said = said.format(line)
    assert said in reason


def test_states_of_rows_tie_a_tensor_together_and_one_number_for_it_does_not():
    @rule
    def counted(param, grad, count=state(shape="tensor")):
        return param - grad / (count + 1), count + 1

    @rule
    def by_row(param, grad, scale=state(1.0, shape="row")):
        return param - grad * scale, scale / 2

    assert locality(program_of(counted))[0] == "elementwise"
    assert is_by_tensor(program_of(counted))
    assert not is_by_tensor(program_of(lion))
    kind, reason = locality(program_of(by_row))
    assert kind == "factored"
    assert reason.startswith("load scale in line ")


def test_what_nothing_depends_on_does_not_count_for_locality():
    text = to_text(program_of(lion)).replace("store param", "%22 = sum %21 : real tensor\nstore param")
    assert locality(parse_text(text))[0] == "elementwise"
    assert locality(parse_text(text.replace("store exp_avg %14", "store exp_avg %22")))[0] == "reduced"
