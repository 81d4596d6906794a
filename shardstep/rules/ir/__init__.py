"""The intermediate form of rules: typed SSA, small enough for one screen.

    program     = "rule" NAME newline { state } { hyper } { instruction } { store }
    state       = "state" NAME SHAPE "=" ( NUMBER | "param" ) [ DTYPE ] newline
    hyper       = "hyper" NAME [ COUNT | SHAPE ] newline                      COUNT entries, if it is a tuple
    instruction = "%" N "=" OPERATION { attribute } { "%" N } ":" KIND SHAPE [ "@" LINE ":" COLUMN ] newline
    store       = "store" NAME "%" N newline                                  the new param, or a new state
    KIND        = "real" | "bool" | "word"       the compute dtype, a truth value, its bits as an unsigned integer
    SHAPE       = "uniform" | "tensor" | "row" | "column" | "element" | "rr" | "cc" | "cr"
    attribute   = NUMBER | NAME | "true" | "false"

An instruction refers to earlier ones only; its number is its place in the list. A `uniform` is one number a step,
the same for all tensors; a `tensor` value is one number for each tensor; `row` and `column` values, one for each
row or column of the parameter seen as matrices (`rules.view`); an `element`, one for each of its elements (and r × c
where whole matrices meet); `rr`, `cc` and `cr` are the other matrices that can be made of it: one value for each pair
of rows, each pair of columns, and the transpose.

`operations` says which operations there are; `program` holds them; `phase` cuts them into passes over memory, and
`steps` those with matrix products; `text` prints and reads them; `verify` checks them. Uniform and tensor values are
float64 on the host, rounded once where they meet the others. Nothing here knows Python's syntax, a back end, or a dtype
other than the name that a state is stored in.
"""

from shardstep.rules.ir.operations import OPERATIONS, SQUARE, Kind, Operation, Shape, Type
from shardstep.rules.ir.phase import Phase, Phases, Vector
from shardstep.rules.ir.program import Attribute, Builder, Hyper, Instruction, Place, Program, State
from shardstep.rules.ir.steps import Buffer, Product, Step, Steps, Sweep, Turn, Unit
from shardstep.rules.ir.text import parse_text, to_text
from shardstep.rules.ir.verify import VerifyError, verify

__all__ = [
    "OPERATIONS",
    "SQUARE",
    "Attribute",
    "Buffer",
    "Builder",
    "Hyper",
    "Instruction",
    "Kind",
    "Operation",
    "Phase",
    "Phases",
    "Place",
    "Product",
    "Program",
    "Shape",
    "State",
    "Step",
    "Steps",
    "Sweep",
    "Turn",
    "Type",
    "Unit",
    "Vector",
    "VerifyError",
    "parse_text",
    "to_text",
    "verify",
]
