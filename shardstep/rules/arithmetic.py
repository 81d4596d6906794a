"""What the operations and functions of the language are made of, whatever a value is: a type or an instruction.

The orders written here are part of the language's bits. Numbers alone are computed at once, in Python's float64.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

from shardstep.rules.ir import OPERATIONS, Kind, Type
from shardstep.rules.syntax import Span

V = TypeVar("V")


@dataclass(frozen=True)
class Known:
    """A number that is known while compiling: a literal, a captured constant, the variable of a loop."""

    value: float
    span: Span

    @property
    def is_number(self) -> bool:
        return not isinstance(self.value, bool)


@dataclass(frozen=True)
class Source:
    """An array, a hyper-parameter or an entry of one, not yet read. ``span`` is where it is about to be."""

    operation: Literal["load", "hyper"]
    name: str
    index: int | None = None
    kind: Kind = "real"
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Partial:
    """What only one branch of an ``if`` defines."""


Item: TypeAlias = Any
"""What an expression gives: a Known, a Source, a tuple of items, or a V."""

_FOLDED: Final[dict[str, Callable[[float, float], float]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "mod": operator.mod,
}
_LARGEST, _SMALLEST = 3.4028234663852886e38, 2.0**-149


class Arithmetic(ABC, Generic[V]):
    """V stands for a value at run time."""

    def __init__(self) -> None:
        self._read: dict[Source, V] = {}

    @abstractmethod
    def constant(self, value: float, span: Span) -> V:
        """A number as a float, or a truth value."""

    @abstractmethod
    def load(self, name: str, span: Span) -> V: ...

    @abstractmethod
    def hyper(self, name: str, index: int | None, kind: Kind, span: Span) -> V: ...

    @abstractmethod
    def emit(self, operation: str, arguments: Sequence[V], span: Span) -> V: ...

    @abstractmethod
    def type_of(self, value: V) -> Type | None:
        """None for what is wrong already."""

    @abstractmethod
    def wrong(self) -> V:
        """What stands where a mistake was; it causes no second one."""

    @abstractmethod
    def refuse(self, code: str, span: Span, message: str, hint: str) -> V:
        """A mistake; gives `wrong`."""

    def is_right(self, item: Item) -> bool:
        return isinstance(item, Known | Source | tuple) or self.type_of(item) is not None

    def live(self, item: Item, span: Span) -> V:
        """The run-time value of ``item``, which is used at ``span``. Each array and hyper-parameter is read once."""
        match item:
            case Known(value=bool() as truth):
                return self.constant(truth, item.span)
            case Known(value=value):
                try:
                    return self.constant(float(value), item.span)
                except OverflowError:
                    return self.refuse("E11", item.span, "this number overflows", "write a smaller number")
            case tuple():
                text = f"expected one number, got a tuple of {len(item)}"
                return self.refuse("E20", span, text, "take one of its entries: betas[0]")
            case Source(operation="load"):
                if item not in self._read:
                    self._read[item] = self.load(item.name, item.span or span)
                return self._read[item]
            case Source():
                if item not in self._read:
                    self._read[item] = self.hyper(item.name, item.index, item.kind, item.span or span)
                return self._read[item]
        value_: V = item
        return value_

    def apply(self, operation: str, items: Sequence[Item], span: Span) -> V:
        """One operation of the table."""
        values = [self.live(item, span) for item in items]
        if OPERATIONS[operation].family == "pointwise" and not all(map(self._is_on_host, values)):
            for item in items:
                if isinstance(item, Known) and item.is_number and (fault := _fault_of_constant(item.value)):
                    code, text, hint = fault
                    return self.refuse(code, item.span, text, hint)
        return self.emit(operation, values, span)

    def _is_on_host(self, value: V) -> bool:
        type_ = self.type_of(value)
        return type_ is None or type_.is_single

    def choose(self, condition: V, then: Item, otherwise: Item, span: Span) -> Item:
        """One of two, by a condition that is the same for all elements."""
        if then is otherwise or (isinstance(then, Source) and then == otherwise):
            return then
        if isinstance(then, Partial) or isinstance(otherwise, Partial):
            return Partial()
        if isinstance(then, Known) and isinstance(otherwise, Known) and repr(then.value) == repr(otherwise.value):
            return then
        if isinstance(then, tuple) and isinstance(otherwise, tuple) and len(then) == len(otherwise):
            return tuple(self.choose(condition, a, b, span) for a, b in zip(then, otherwise, strict=True))
        return self.emit("choose", [condition, self.live(then, span), self.live(otherwise, span)], span)

    def negative(self, item: Item, span: Span) -> Item:
        """``-x``: of a number, another number."""
        if isinstance(item, Known) and item.is_number:
            return Known(-item.value, span)
        return self.apply("neg", [item], span)

    def binary(self, operation: str, left: Item, right: Item, span: Span) -> Item:
        """``+ - * / % @``: numbers alone are computed at once."""
        numbers = [item.value for item in (left, right) if isinstance(item, Known) and item.is_number]
        if len(numbers) < 2 or operation not in _FOLDED:
            return self.apply(operation, [left, right], span)
        try:
            return Known(_FOLDED[operation](*numbers), span)
        except ZeroDivisionError:
            return self.refuse("E11", span, "this number is a division by zero", "divide by another number")
        except OverflowError:
            return self.refuse("E11", span, "this number overflows", "write a smaller number")

    def power(self, base: Item, exponent: Item, span: Span) -> Item:
        """``x ** n``: for n of −4 … 4 and values that are not uniform by multiplications, x², x²·x, x²·x², and
        1 / xⁿ; for n = 0.5 a square root; otherwise ``pow``.
        """
        count = exponent.value if isinstance(exponent, Known) and exponent.is_number else None
        if isinstance(base, Known) or count not in (-4, -3, -2, -1, 0, 0.5, 1, 2, 3, 4):
            return self.apply("pow", [base, exponent], span)
        value = self.live(base, span)
        type_ = self.type_of(value)
        if type_ is None or (type_.kind == "real" and type_.shape == "uniform"):
            return self.apply("pow", [value, exponent], span)
        if count == 0.5:
            return self.apply("sqrt", [value], span)
        if count >= 0:
            return self._product(value, int(count), span)
        return self.apply("div", [Known(1.0, span), self._product(value, int(-count), span)], span)

    def _product(self, value: V, count: int, span: Span) -> Item:
        if count < 2:
            return value if count else Known(1.0, span)
        square = self.apply("mul", [value, value], span)
        if count == 2:
            return square
        return self.apply("mul", [square, value if count == 3 else square], span)

    def word(self, name: str, items: Sequence[Item], span: Span) -> V:
        """A function of `language.WORDS`."""
        match name, items:
            case "clip", (x, low, high):
                return self.apply("minimum", [self.apply("maximum", [x, low], span), high], span)
            case "lerp", (start, end, weight):
                return self.apply("fma", [weight, self.apply("sub", [end, start], span), start], span)
            case "mean", (x,):
                return self._mean(self.live(x, span), span)
            case "norm", (x,):
                return self.apply("sqrt", [self.apply("sum", [self.apply("mul", [x, x], span)], span)], span)
            case "max_abs", (x,):
                return self.apply("max", [self.apply("abs", [x], span)], span)
            case "row_mean", (x,):
                return self._mean_along("row_sum", "columns", x, span)
            case "col_mean", (x,):
                return self._mean_along("column_sum", "rows", x, span)
        return self.apply(name, items, span)

    def _mean(self, value: V, span: Span) -> V:
        total, type_ = self.apply("sum", [value], span), self.type_of(value)
        if type_ is None or self.type_of(total) is None:
            return self.wrong()
        match type_.shape:
            case "row" | "column" as line:
                terms = self.emit("columns" if line == "row" else "rows", [], span)
                count = self.emit("div", [self.emit("numel", [], span), terms], span)
            case "rr" | "cc" as square:
                side, other = ("rows", "columns") if square == "rr" else ("columns", "rows")
                lines = self.emit("div", [self.emit("numel", [], span), self.emit(other, [], span)], span)
                count = self.emit("mul", [lines, self.emit(side, [], span)], span)
            case _:
                count = self.emit("numel", [], span)
        return self.emit("div", [total, count], span)

    def _mean_along(self, reduction: str, count: str, item: Item, span: Span) -> V:
        total = self.apply(reduction, [item], span)
        return self.emit("div", [total, self.emit(count, [], span)], span)


def known(value: float | tuple[float, ...], span: Span) -> Item:
    """A captured constant, as it is used at ``span``."""
    return tuple(known(entry, span) for entry in value) if isinstance(value, tuple) else Known(value, span)


def _fault_of_constant(value: float) -> tuple[str, str, str] | None:
    """What is wrong with a number that meets element values, which may be float32."""
    if _LARGEST < abs(value) < math.inf:
        return "E11", f"the number {value!r} overflows float32", "write a smaller one, or math.inf"
    if 0 < abs(value) <= _SMALLEST / 2:
        return "E12", f"the number {value!r} is zero in float32", "write a larger one"
    return None
