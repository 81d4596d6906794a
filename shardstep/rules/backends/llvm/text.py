"""A phase as a module in LLVM's text: ``run(table, count)`` goes through the rows of a table.

A row is cut into *runs*: all of it, or, where there are reductions, its part of each block of the global grid; where
there are rows and columns, its part of each row of the tensor besides; and where there are states in 8 bits, its part
of the elements that share a scale. A run is a scalar head until the vectors are aligned, vectors, and a scalar tail;
both bodies say the same. Vectors are aligned to the grid's 16 lanes where there are reductions, else to the cache lines
of ``low``, else not at all. New states in 8 bits are encoded when all elements of a scale are there.
"""

from typing import Final

from shardstep.rules.backends.blocks import LANES
from shardstep.rules.backends.llvm.body import Body, Job
from shardstep.rules.backends.llvm.code import Code
from shardstep.rules.backends.llvm.dynamic8 import call_of_encoder, encoders
from shardstep.rules.backends.llvm.lanes import begin_of_row, empty_lanes, end_of_row, fold_blocks, scale_of
from shardstep.rules.backends.llvm.shared import Shared
from shardstep.rules.binding import scale_name
from shardstep.types import BLOCK_NUMEL as BLOCK
from shardstep.types import SCALED_NUMEL

_ATTRIBUTES: Final = 'attributes #0 = { nounwind "min-legal-vector-width"="512" "prefer-vector-width"="512" }'

_DEFAULT_MXCSR: Final = 0x1F80
"""Nearest even, denormals kept, no traps."""


def module_text(job: Job, x86: bool) -> str:
    """The whole module. Raises RuleError for what a phase of elements cannot have."""
    functions = [*encoders([stored for _, stored in job.encoded], job.width), _row(job), _run(job, x86)]
    return "\n".join([_declarations(job, x86), *functions, _ATTRIBUTES, "!0 = !{i32 1}\n"])


def _declarations(job: Job, x86: bool) -> str:
    lines = []
    for code in (Code(1, ""), Code(job.width, "")):
        for scalar in ("float", "double"):
            type_, suffix = code.type(scalar), code.suffix(scalar)
            lines += [f"declare {type_} @llvm.{name}.{suffix}({type_})" for name in ("fabs", "sqrt")]
            lines.append(f"declare {type_} @llvm.fma.{suffix}({type_}, {type_}, {type_})")
    if x86:
        lines += [f"declare void @llvm.x86.sse.{name}(ptr)" for name in ("stmxcsr", "ldmxcsr")]
        lines.append("declare void @llvm.x86.sse.sfence()")
    return "\n".join(lines) + "\n"


def _run(job: Job, x86: bool) -> str:
    """The entry. Denormals are kept in here, whatever the thread that calls has set."""
    return f"""define void @run(ptr %table, i64 %count) #0 {{
entry:
{_enter() if x86 else ""}
  br label %test
test:
  %i = phi i64 [0, %entry], [%next, %body]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %body, label %done
body:
  %at = mul i64 %i, {8 * job.layout.words}
  %row = getelementptr i8, ptr %table, i64 %at
  call void @row(ptr %row)
  %next = add i64 %i, 1
  br label %test
done:
{_leave(job) if x86 else ""}
  ret void
}}
"""


def _enter() -> str:
    return f"""  %theirs = alloca i32
  %ours = alloca i32
  call void @llvm.x86.sse.stmxcsr(ptr %theirs)
  store i32 {_DEFAULT_MXCSR}, ptr %ours
  call void @llvm.x86.sse.ldmxcsr(ptr %ours)"""


def _leave(job: Job) -> str:
    """Stores around the caches are not ordered by themselves."""
    fence = "\n  call void @llvm.x86.sse.sfence()" if job.full_lines else ""
    return f"  call void @llvm.x86.sse.ldmxcsr(ptr %theirs){fence}"


def _row(job: Job) -> str:
    """One row. It must not become part of ``run``, whose setting of denormals comes first."""
    shared = Shared(job.phase.body, job.binding.compute)
    scalar, vector = Body(job, 1, "%i", shared), Body(job, job.width, "%j", shared)
    last = "row.done" if job.phase.has_lines and job.of_blocks else "scale.next" if job.encoded else "run.done"
    accumulators = [
        f"%held{r.number} = phi <16 x {r.type}> "
        f"[%before{r.number}, %vector.begin], [{vector.accumulators[r.number]}, %vector]"
        for r in job.laned
    ]
    return f"""define internal void @row(ptr %row) noinline #0 {{
entry:
{_prologue(job)}
{chr(10).join(shared.lines)}
  %empty = icmp eq i64 %count, 0
  br i1 %empty, label %exit, label %run
run:
  %begin = phi i64 [0, %entry], [%end, %{last}]
{_begin(job)}
  %beyond = add i64 %begin, %head
  %short = icmp ult i64 %end, %beyond
  %first = select i1 %short, i64 %end, i64 %beyond
  br label %scalar.test
scalar.test:
  %i = phi i64 [%begin, %run], [%i.next, %scalar], [%j, %vector.done]
  %stop = phi i64 [%first, %run], [%stop, %scalar], [%end, %vector.done]
  %scalar.more = icmp ult i64 %i, %stop
  br i1 %scalar.more, label %scalar, label %scalar.done
scalar:
{scalar.text}
  %i.next = add i64 %i, 1
  br label %scalar.test
scalar.done:
  %over = icmp eq i64 %i, %end
  br i1 %over, label %run.done, label %vector.begin
vector.begin:
{_each(job, "%before{k} = load <16 x {type}>, ptr %lanes{k}")}
  br label %vector.test
vector.test:
  %j = phi i64 [%i, %vector.begin], [%j.next, %vector]
{_lines(accumulators)}
  %j.next = add i64 %j, {job.width}
  %fits = icmp ule i64 %j.next, %end
  br i1 %fits, label %vector, label %vector.done
vector:
{vector.text}
  br label %vector.test
vector.done:
{_each(job, "store <16 x {type}> %held{k}, ptr %lanes{k}")}
  br label %scalar.test
run.done:
{end_of_row(job) if job.phase.has_lines else _folds(job)}
{_encodings(job)}
  %all = icmp eq i64 %end, %count
  br i1 %all, label %exit, label %run
exit:
  ret void
}}
"""


def _lines(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _each(job: Job, template: str) -> str:
    return _lines([template.format(k=reduction.number, type=reduction.type) for reduction in job.laned])


def _begin(job: Job) -> str:
    """The %end of the run, and the length of the %head before its vectors."""
    if job.phase.has_lines:
        return begin_of_row(job)
    if job.reductions:
        return _run_in_block(job)
    return _run_of_a_scale(job) if job.is_scaled else _whole_run(job)


def _prologue(job: Job) -> str:
    """What the row says, and room for the lanes of reductions."""
    layout, lines = job.layout, list[str]()

    def read(name: str, type_: str, word: int) -> None:
        lines.append(f"%at.{name} = getelementptr i8, ptr %row, i64 {8 * word}")
        lines.append(f"%{name} = load {type_}, ptr %at.{name}, align 1")

    for word, name in enumerate(layout.arrays):
        lines.append(f"; {name}")
        read(f"array{word}", "ptr", word)
    read("low", "ptr", layout.low)
    read("count", "i64", layout.count)
    read("offset", "i64", layout.offset)
    for k in range(layout.reductions):
        read(f"partials{k}", "ptr", layout.first_partials + k)
    lines += [f"%lanes{reduction.number} = alloca <16 x {reduction.type}>" for reduction in job.laned]
    if layout.vectors is not None:
        for word, name in enumerate(("place", "columns", "rows")):
            read(name, "i64", layout.first_of_lines + word)
        for k in range(layout.vectors):
            read(f"vector{k}", "ptr", layout.first_of_lines + 3 + k)
        lines += [empty_lanes(reduction) for reduction in job.of_blocks]
    for k in range(layout.scalars):
        read(f"exact.s{k}", "double", layout.first_scalar + k)
    lines += [f"%new{job.place(name)} = alloca [{SCALED_NUMEL} x float], align 64" for name, _ in job.encoded]
    return _lines(lines)


def _whole_run(job: Job) -> str:
    """The %end of the run, and the length of the %head before its vectors."""
    if not job.full_lines:
        return "  %end = add i64 %count, 0\n  %head = add i64 0, 0"
    return f"  %end = add i64 %count, 0\n{_HEAD}"


_HEAD: Final = """  %low.begin = getelementptr i16, ptr %low, i64 %begin
  %address = ptrtoint ptr %low.begin to i64
  %back = sub i64 0, %address
  %gap = and i64 %back, 63
  %head = lshr i64 %gap, 1"""


def _run_of_a_scale(job: Job) -> str:
    """The same for the elements of one scale."""
    return f"""{_lines(scale_of("%count"))}
  %end = add i64 %scale.end, 0
{_HEAD if job.full_lines else "  %head = add i64 0, 0"}"""


def _run_in_block(job: Job) -> str:
    """The same for the part of a block of the grid; and lanes that hold nothing yet."""
    return f"""  %position = add i64 %offset, %begin
  %inside = and i64 %position, {BLOCK - 1}
  %room = sub i64 {BLOCK}, %inside
  %border = add i64 %begin, %room
  %whole = icmp ult i64 %border, %count
  %end = select i1 %whole, i64 %border, i64 %count
  %back = sub i64 0, %position
  %head = and i64 %back, {LANES - 1}
{_lines([empty_lanes(reduction) for reduction in job.reductions])}"""


def _folds(job: Job) -> str:
    """The lanes of each reduction become one number of its block."""
    if not job.reductions:
        return ""
    return fold_blocks(job)


def _encodings(job: Job) -> str:
    """The new states in 8 bits, if this run has made the last of the numbers that share a scale."""
    if not job.encoded:
        return ""
    lines = [
        "%scale.over = icmp eq i64 %end, %scale.end",
        "br i1 %scale.over, label %scale.done, label %scale.next",
    ]
    inside = [
        "%length = sub i64 %end, %scale.first",
        f"%entry.of.scale = lshr i64 %scale.first, {SCALED_NUMEL.bit_length() - 1}",
    ]
    for name, stored in job.encoded:
        codes, scale = job.place(name), job.place(scale_name(name))
        inside.append(f"%codes{codes} = getelementptr i8, ptr %array{codes}, i64 %scale.first")
        inside.append(f"%scale{codes} = getelementptr float, ptr %array{scale}, i64 %entry.of.scale")
        inside.append(call_of_encoder(stored, f"%new{codes}", f"%codes{codes}", f"%scale{codes}", "%length"))
    inside.append("br label %scale.next")
    return "\n".join([_lines(lines), "scale.done:", _lines(inside), "scale.next:"])
