"""What reductions hold while a run goes on, and where runs begin and end in rows of a tensor, in LLVM's text.

A reduction has 16 lanes, which become one number at the end of a block of the grid or of a run within one row. Those of
columns have no lanes: each column has its number in memory, which this call alone adds to. Where there are rows, a
block may end in a later run than it began: its lanes are emptied before the first run, and after each block.
"""

from shardstep.rules.backends.blocks import LANES
from shardstep.rules.backends.llvm.body import Job, Reduction, combined
from shardstep.rules.backends.llvm.code import REAL, Code
from shardstep.types import BLOCK_NUMEL as BLOCK
from shardstep.types import SCALED_NUMEL


def empty_lanes(reduction: Reduction) -> str:
    """They hold nothing yet."""
    k, type_ = reduction.number, reduction.type
    return f"store <16 x {type_}> splat ({type_} {reduction.start}), ptr %lanes{k}"


def fold_blocks(job: Job) -> str:
    """The lanes of each reduction over blocks become one number: lane l takes lane l + 8, then l + 4, l + 2, l + 1."""
    code = Code(LANES, "fold")
    code.lines += ["  %origin = lshr i64 %offset, 10", "  %here = lshr i64 %position, 10"]
    code.line("%block = sub i64 %here, %origin")
    for reduction in job.of_blocks:
        partial = _folded(code, reduction)
        address = code.let(f"getelementptr double, ptr %partials{reduction.number}, i64 %block")
        code.line(f"store double {partial}, ptr {address}")
    return "\n".join(code.lines)


def begin_of_row(job: Job) -> str:
    """The %end of the run and the length of its %head, where its row and its columns are, and empty lanes."""
    code = Code(1, "row")
    limit = "%count"
    if job.of_blocks:
        code.lines += _block()
        limit = "%block.end"
    if job.is_scaled:
        code.lines += [f"  {line}" for line in scale_of(limit)]
        limit = "%scale.end"
    code.lines += [
        "  %now = add i64 %place, %begin",
        "  %line = udiv i64 %now, %columns",
        "  %line.begin = mul i64 %line, %columns",
        "  %column = sub i64 %now, %line.begin",
        "  %left = sub i64 %columns, %column",
        "  %line.end = add i64 %begin, %left",
        f"  %in.line = icmp ult i64 %line.end, {limit}",
        f"  %end = select i1 %in.line, i64 %line.end, i64 {limit}",
        "  %matrix = udiv i64 %line, %rows",
        "  %matrix.first = mul i64 %matrix, %columns",
        "  %first.column = add i64 %matrix.first, %column",
        "  %shift = sub i64 %first.column, %begin",
        *(["  %back = sub i64 0, %position"] if job.of_blocks else []),
        f"  %head = {f'and i64 %back, {LANES - 1}' if job.of_blocks else 'add i64 0, 0'}",
    ]
    for k, vector in enumerate(job.phase.vectors):
        if vector.shape == "row":
            real = "double" if vector.anchors else REAL[job.binding.compute]
            address = code.let(f"getelementptr {real}, ptr %vector{k}, i64 %line")
            code.line(f"%of.v{k} = load {real}, ptr {address}")
    code.lines += [f"  {empty_lanes(reduction)}" for reduction in job.of_rows]
    return "\n".join(code.lines)


def scale_of(limit: str) -> list[str]:
    """Which elements share a scale with the run's first one: up to ``limit``."""
    return [
        f"%scale.first = and i64 %begin, {-SCALED_NUMEL}",
        f"%beyond.scale = add i64 %scale.first, {SCALED_NUMEL}",
        f"%whole.scale = icmp ult i64 %beyond.scale, {limit}",
        f"%scale.end = select i1 %whole.scale, i64 %beyond.scale, i64 {limit}",
    ]


def _block() -> list[str]:
    return [
        "  %position = add i64 %offset, %begin",
        f"  %inside = and i64 %position, {BLOCK - 1}",
        f"  %room = sub i64 {BLOCK}, %inside",
        "  %border = add i64 %begin, %room",
        "  %whole = icmp ult i64 %border, %count",
        "  %block.end = select i1 %whole, i64 %border, i64 %count",
    ]


def end_of_row(job: Job) -> str:
    """What the row has becomes a part of its number; so do the blocks' lanes, if the block ends here."""
    code = Code(LANES, "end")
    for reduction in job.of_rows:
        partial, one = _folded(code, reduction), Code(1, f"sum{reduction.number}.")
        code.line(
            f"%at.row{reduction.number} = getelementptr {reduction.type}, ptr %partials{reduction.number}, i64 %line"
        )
        before = one.let(f"load {reduction.type}, ptr %at.row{reduction.number}")
        total = combined(one, reduction, before, partial)
        one.line(f"store {reduction.type} {total}, ptr %at.row{reduction.number}")
        code.lines += one.lines
    if job.of_blocks:
        emptied = [f"  {empty_lanes(reduction)}" for reduction in job.of_blocks]
        code.lines += [
            "  %block.over = icmp eq i64 %end, %block.end",
            "  br i1 %block.over, label %block.done, label %row.done",
            "block.done:",
            fold_blocks(job),
            *emptied,
            "  br label %row.done",
            "row.done:",
        ]
    return "\n".join(code.lines)


def _folded(code: Code, reduction: Reduction) -> str:
    held = code.let(f"load <16 x {reduction.type}>, ptr %lanes{reduction.number}")
    for half in (8, 4, 2, 1):
        places = ", ".join(f"i32 {lane + half}" if lane < half else "i32 poison" for lane in range(LANES))
        type_ = code.type(reduction.type)
        upper = code.let(f"shufflevector {type_} {held}, {type_} poison, <16 x i32> <{places}>")
        held = combined(code, reduction, held, upper)
    return code.let(f"extractelement <16 x {reduction.type}> {held}, i64 0")
