"""Phases written by hand, as the compiler makes them, and bindings of them."""

import torch

from shardstep.rules import ir
from shardstep.rules.binding import Binding

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

ADAMW = """
rule adamw
state exp_avg element = 0.0
state exp_avg_sq element = 0.0
{hypers}
%0 = load param : real element
%1 = load grad : real element
%2 = load exp_avg : real element
%3 = load exp_avg_sq : real element
%4 = hyper s0 : real uniform
%5 = hyper s1 : real uniform
%6 = hyper s2 : real uniform
%7 = hyper s3 : real uniform
%8 = hyper s4 : real uniform
%9 = hyper s5 : real uniform
%10 = hyper s6 : real uniform
%11 = sub %1 %2 : real element
%12 = fma %4 %11 %2 : real element @ 3:4
%13 = mul %5 %1 : real element
%14 = mul %3 %6 : real element
%15 = fma %13 %1 %14 : real element @ 4:4
%16 = sqrt %15 : real element
%17 = div %16 %7 : real element
%18 = add %17 %8 : real element
%19 = mul %0 %9 : real element
%20 = mul %10 %12 : real element
%21 = div %20 %18 : real element
%22 = sub %19 %21 : real element @ 6:4
store param %22
store exp_avg %12
store exp_avg_sq %15
"""
LION = """
rule lion
state exp_avg element = 0.0
{hypers}
%0 = load param : real element
%1 = load grad : real element
%2 = load exp_avg : real element
%3 = hyper s0 : real uniform
%4 = hyper s1 : real uniform
%5 = mul %2 %3 : real element
%6 = mul %1 %4 : real element
%7 = add %5 %6 : real element
%8 = sign %7 : real element
%9 = mul %0 %4 : real element
%10 = add %8 %9 : real element
%11 = sub %0 %10 : real element
%12 = sub %1 %2 : real element
%13 = mul %12 %3 : real element
%14 = add %2 %13 : real element
store param %11
store exp_avg %14
"""
SUMS = """
rule sums
{hypers}
%0 = load param : real element
%1 = load grad : real element
%2 = hyper s0 : real uniform
%3 = mul %0 %2 : real element
%4 = mul %1 %0 : real element
%5 = sum %4 : real tensor
%6 = abs %1 : real element
%7 = max %6 : real tensor
%8 = sum %0 : real tensor
store param %3
"""
WORDS = """
rule words
state mixed element = 0.0
%0 = load param : real element
%1 = const 12582912.0 : real uniform
%2 = add %0 %1 : real element
%3 = bits %2 : word element
%4 = word_shl 23 %3 : word element
%5 = const 1065353216 : word uniform
%6 = word_add %4 %5 : word element
%7 = from_bits %6 : real element
%8 = sub %2 %1 : real element
%9 = sub %0 %8 : real element
%10 = const 0.6931 : real uniform
%11 = fma %9 %10 %10 : real element
%12 = mul %11 %7 : real element
%13 = index : word element
%14 = const 2654435769 : word uniform
%15 = word_mul %13 %14 : word element
%16 = word_shr 9 %15 : word element
%17 = word_or %16 %5 : word element
%18 = from_bits %17 : real element
store param %12
store mixed %18
"""


def phase(text, scalars=0, sums=()):
    hypers = "\n".join(f"hyper s{k}" for k in range(scalars))
    body = ir.verify(ir.parse_text(text.format(hypers=hypers)))
    return ir.Phase(body, tuple(range(scalars)), tuple((number, number) for number in sums))


def everything():
    """Each operation once, on param and grad, its result in a state of its own."""
    names = [name for name, operation in ir.OPERATIONS.items() if operation.family == "pointwise"]
    names = [name for name in names if name not in ("exp", "log", "tanh", "rsqrt", "pow", "choose")] + ["index"]
    states = tuple(ir.State(f"of_{name}") for name in names)
    build = ir.Builder({"param": "element", "grad": "element"})
    a, b = build.load("param"), build.load("grad")
    condition, other, one, zero = (
        build.emit("lt", a, b),
        build.emit("gt", b, a),
        build.constant(1.0),
        build.constant(0.0),
    )
    true, words = build.constant(True, "bool"), (build.emit("bits", a), build.emit("bits", b))
    stores = []
    for name in names:
        operation = ir.OPERATIONS[name]
        pools = {"real": (a, b, one), "bool": (condition, other), "word": words}
        operands = [pools[kind][k if operation.takes[0] == kind else k - 1] for k, kind in enumerate(operation.takes)]
        value = build.emit(name, *operands, attributes=(5,) * operation.attributes)
        if operation.gives == "bool":
            value = build.emit("where", build.emit("and", value, true), one, zero)
        stores.append((f"of_{name}", build.emit("from_bits", value) if operation.gives == "word" else value))
    return ir.Phase(ir.verify(ir.Program("everything", states, (), tuple(build.instructions), tuple(stores))), ())


def bind(case, compute=F32, low=None, **stored):
    return Binding(compute, tuple((name, stored.get(name, compute)) for name in case.body.shapes), low)


ADAMW, LION, SUMS, WORDS, ALL = (
    phase(ADAMW, 7),
    phase(LION, 2),
    phase(SUMS, 1, (5, 7, 8)),
    phase(WORDS),
    everything(),
)
CASES = {
    "adamw": (ADAMW, bind(ADAMW)),
    "adamw mixed": (ADAMW, bind(ADAMW, grad=BF16, low=BF16)),
    "adamw float16": (ADAMW, bind(ADAMW, grad=F16, exp_avg=BF16, exp_avg_sq=F16, low=F16)),
    "adamw float64": (ADAMW, bind(ADAMW, F64)),
    "adamw float64 mixed": (ADAMW, bind(ADAMW, F64, grad=F32, exp_avg=BF16, low=F16)),
    "adamw float64 bfloat16": (ADAMW, bind(ADAMW, F64, grad=BF16, exp_avg=F16, low=BF16)),
    "lion": (LION, bind(LION, grad=F64)),
    "words": (WORDS, bind(WORDS)),
    "everything": (ALL, bind(ALL)),
    "everything float64": (ALL, bind(ALL, F64)),
    "sums": (SUMS, bind(SUMS)),
    "sums mixed": (SUMS, bind(SUMS, grad=BF16, low=BF16)),
    "sums float64": (SUMS, bind(SUMS, F64)),
}
