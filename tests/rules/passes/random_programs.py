"""Random well-typed programs of elements, uniform and tensor values, with branches, truth values and reductions."""

from hypothesis import strategies as st

from shardstep.rules.ir import Builder, Hyper, Program, State, verify

_UNARY = ["neg", "abs", "sign", "sqrt", "bfloat16"]
_BINARY = ["add", "sub", "mul", "div", "minimum", "maximum"]
_CONSTANTS = [0.0, -0.0, 1.0, -1.0, 2.0, 0.25, 0.1, 3.0, 2.0**100, 2.0**-127, 1e-8]


@st.composite
def programs(draw) -> Program:
    """Hyper-parameters: lr, betas (two), step, flag; states: a, b."""
    states = (State("a"), State("b"))
    hypers = (Hyper("lr"), Hyper("betas", 2), Hyper("step"), Hyper("flag"))
    build = Builder(Program("random", states, hypers, (), ()).shapes)
    for name in ("param", "grad", "a", "b"):
        build.load(name)
    for name, entry in (("lr", None), ("betas", 0), ("betas", 1), ("step", None)):
        build.hyper(name, entry)
    build.hyper("flag", kind="bool")
    build.emit("gt", 7, 4)
    build.emit("lt", 0, 1)
    build.emit("numel")
    for _ in range(draw(st.integers(3, 25))):
        _random_instruction(draw, build)
    elements = [i for i, line in enumerate(build.instructions) if line.type.kind == "real"]
    stores = [(name, draw(st.sampled_from(elements[-8:]))) for name in draw(st.sampled_from(_STORED))]
    return verify(Program("random", states, hypers, tuple(build.instructions), tuple(stores)))


_STORED = [["param", "a", "b"], ["param"], ["a", "param"]]


def _random_instruction(draw, build: Builder) -> None:
    kinds = {
        kind: [i for i, line in enumerate(build.instructions) if line.type.kind == kind] for kind in ("real", "bool")
    }
    real, truth = (lambda kind=kind: draw(st.sampled_from(kinds[kind][-20:])) for kind in ("real", "bool"))
    uniform = [i for i in kinds["bool"] if build.type_of(i).shape == "uniform"]
    elements = [i for i in kinds["real"] if build.type_of(i).shape == "element"]
    match draw(
        st.sampled_from("constant unary binary binary binary fma compare logic not where choose bits sum".split())
    ):
        case "constant":
            build.constant(draw(st.sampled_from(_CONSTANTS)))
        case "unary":
            build.emit(draw(st.sampled_from(_UNARY)), real())
        case "binary":
            build.emit(draw(st.sampled_from(_BINARY)), real(), real())
        case "fma":
            at = draw(st.sampled_from(elements))
            build.emit("fma", at, real(), real())
        case "compare":
            build.emit(draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"])), real(), real())
        case "logic":
            build.emit(draw(st.sampled_from(["and", "or"])), truth(), truth())
        case "not":
            build.emit("not", truth())
        case "where":
            build.emit("where", truth(), real(), real())
        case "choose":
            # both branches of elements: where one is not, specialising means to make the result one number for all
            yes, no = (draw(st.sampled_from(elements)) for _ in range(2))
            build.emit("choose", draw(st.sampled_from(uniform)), yes, no)
        case "bits":
            build.emit("from_bits", build.emit("bits", draw(st.sampled_from(elements))))
        case "sum":
            build.emit(draw(st.sampled_from(["sum", "max"])), draw(st.sampled_from(elements)))
