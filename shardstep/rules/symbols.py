"""The stand-ins that a rule is run with while it is traced: they record what is done to them.

A ``Scalar`` grows a host expression; an ``Element`` appends instructions to its ``Recorder``. Python's own
order of evaluation is the order recorded. Nothing is simplified, reordered or computed here.
"""

from dataclasses import dataclass, field
from typing import Any, NoReturn

from shardstep.errors import RuleError
from shardstep.rules.program import (
    Constant,
    HostExpression,
    HostOperation,
    Instruction,
    Operand,
    Uniform,
    Value,
)


@dataclass
class Recorder:
    """The instructions and uniforms seen so far in one trace.

    ``inputs`` values exist before the first one.
    """

    inputs: int
    instructions: list[Instruction] = field(default_factory=list)
    uniforms: dict[str, HostExpression] = field(default_factory=dict)

    def record(self, operation: str, *arguments: "Element | HostExpression") -> "Element":
        self.instructions.append(Instruction(operation, tuple(map(self._operand, arguments))))
        return Element(self, self.inputs + len(self.instructions) - 1)

    def _operand(self, argument: "Element | HostExpression") -> Operand:
        if isinstance(argument, Element):
            return Value(argument.index)
        key = repr(argument)  # by text: == would take 0.0 for -0.0
        self.uniforms.setdefault(key, argument)
        return Uniform(list(self.uniforms).index(key))


class Symbol:
    """What ``Element`` and ``Scalar`` share: arithmetic, and refusing to be a concrete number."""

    kind = "value"

    def __add__(self, other: Any) -> Any:
        return operate("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return operate("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return operate("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return operate("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return operate("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return operate("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return operate("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return operate("div", other, self)

    def __pow__(self, other: Any) -> Any:
        return operate("pow", self, other)

    def __rpow__(self, other: Any) -> Any:
        return operate("pow", other, self)

    def __neg__(self) -> Any:
        return operate("neg", self)

    def __pos__(self) -> Any:
        return self

    def _compared(self, other: object) -> NoReturn:
        raise RuleError(
            f"expected arithmetic, got a comparison of {self.kind}; comparisons are not part of the "
            f"language, use minimum, maximum, abs or sign"
        )

    __lt__ = __le__ = __gt__ = __ge__ = _compared
    __eq__ = __ne__ = _compared
    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise RuleError(
            f"expected straight-line equations, got a branch on {self.kind}; a rule is read once for all "
            f"elements and all steps, so use minimum, maximum, abs or sign instead of if, and, or, not"
        )

    def _made_concrete(self, *_: object) -> NoReturn:
        raise RuleError(
            f"expected the functions of the language, got {self.kind} where Python needs a concrete number "
            f"or sequence; use sqrt, abs, sign, minimum, maximum by their bare names, and index only tuples"
        )

    __float__ = __int__ = __index__ = __iter__ = __getitem__ = __len__ = _made_concrete


class Scalar(Symbol):
    """A number that is known once per step, before any element is touched."""

    kind = "a per-step scalar"

    def __init__(self, expression: HostExpression) -> None:
        self.expression = expression


class Element(Symbol):
    """Any one element of an array, or what was computed from it."""

    kind = "element values"

    def __init__(self, recorder: Recorder, index: int) -> None:
        self.recorder = recorder
        self.index = index


def operate(operation: str, *arguments: Any) -> Any:
    """Record ``operation`` on symbols and numbers, at least one a symbol; else NotImplemented."""
    operands: list[Element | HostExpression] = []
    recorder: Recorder | None = None
    for argument in arguments:
        if isinstance(argument, Element):
            recorder = argument.recorder
            operands.append(argument)
        elif isinstance(argument, Scalar):
            operands.append(argument.expression)
        elif isinstance(argument, int | float):
            operands.append(Constant(float(argument)))
        else:
            return NotImplemented
    if recorder is not None:
        return _operate_on_elements(recorder, operation, operands)
    return Scalar(HostOperation(operation, tuple(o for o in operands if not isinstance(o, Element))))


def _operate_on_elements(recorder: Recorder, operation: str, operands: "list[Element | HostExpression]") -> Element:
    if operation == "pow":
        raise RuleError(
            "expected ** between scalars only, got a power of element values; write x * x for a square, "
            "sqrt(x) for a root"
        )
    return recorder.record(operation, *operands)
