"""Is a program well formed? Checked before and after every pass, so that a wrong pass names itself."""

from shardstep.errors import ShardstepError
from shardstep.rules.ir.operations import OPERATIONS, Kind, Type, result_type
from shardstep.rules.ir.program import Instruction, Program


class VerifyError(ShardstepError):
    """A program that no rule can have become: a fault of the compiler, or text that is not the grammar's."""


def verify(program: Program, after: str = "") -> Program:
    """The program itself. Raises VerifyError that names the instruction, and the pass that it came from."""
    told = f" after the pass {after!r}" if after else ""
    for index, line in enumerate(program.instructions):
        if (fault := _fault(program, index, line)) is not None:
            raise VerifyError(f"rule {program.name!r}{told}: %{index} = {line.operation}: {fault}")
    if (fault := _fault_of_stores(program)) is not None:
        raise VerifyError(f"rule {program.name!r}{told}: {fault}")
    return program


def _fault(program: Program, index: int, line: Instruction) -> str | None:
    operation = OPERATIONS.get(line.operation)
    if operation is None:
        return "no such operation"
    if line.arguments and not 0 <= min(line.arguments) <= max(line.arguments) < index:
        return f"its arguments {line.arguments} must be numbers of earlier instructions"
    if line.operation in ("const", "load", "hyper"):
        return _fault_of_source(program, line)
    if len(line.attributes) != operation.attributes:
        return f"expected {operation.attributes} attributes, got {line.attributes}"
    types = tuple([program.instructions[argument].type for argument in line.arguments])
    expected = result_type(line.operation, types)
    if expected is None:
        return f"it cannot take ({', '.join(map(str, types))})"
    return None if line.type == expected else f"expected the type {expected}, got {line.type}"


def _fault_of_source(program: Program, line: Instruction) -> str | None:
    if line.arguments or not line.attributes:
        return f"expected attributes and no arguments, got {line.attributes} and {line.arguments}"
    if line.operation == "const":
        return _fault_of_constant(line)
    name = line.attributes[0]
    if line.operation == "load":
        if name not in program.shapes:
            return f"no array {name!r}"
        expected = Type("real", program.shapes[str(name)])
        return None if line.type == expected else f"expected the type {expected}, got {line.type}"
    hyper = next((h for h in program.hypers if h.name == name), None)
    if hyper is None or line.type.shape != hyper.shape or line.type.kind == "word":
        return f"no hyper-parameter {name!r} that is {line.type}"
    if hyper.count is None:
        return "an entry of what is not a tuple" if len(line.attributes) > 1 else None
    entry = line.attributes[1] if len(line.attributes) == 2 else None
    return None if isinstance(entry, int) and 0 <= entry < hyper.count else f"expected an entry below {hyper.count}"


def _fault_of_constant(line: Instruction) -> str | None:
    expected: dict[Kind, type] = {"real": float, "bool": bool, "word": int}
    if type(line.attributes[0]) is not expected[line.type.kind] or line.type.shape != "uniform":
        return f"expected one {line.type.kind} for all, got {line.attributes[0]!r} : {line.type}"
    return None


def _fault_of_stores(program: Program) -> str | None:
    seen: set[str] = set()
    for name, value in program.stores:
        if name in seen or name == "grad" or name not in program.shapes:
            return f"expected each store to be of param or of a state, once; got {name!r}"
        if not 0 <= value < len(program.instructions):
            return f"store {name}: no instruction %{value}"
        stored = program.instructions[value].type
        if stored.kind != "real" or not _fits(stored.shape, program.shapes[name]):
            return f"store {name}: expected real {program.shapes[name]}, got {stored}"
        seen.add(name)
    return None


def _fits(value: str, array: str) -> bool:
    """Whether a value may fill an array: the same shape, or one that is the same for all of its places."""
    return value == array or value in ("uniform", "tensor") or (array == "element" and value in ("row", "column"))
