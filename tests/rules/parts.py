"""A program run in phases on a tensor that is cut into parts, each with kernels and host values of its own.

What ranks exchange is put together here, so that any cut can be tried in one process.
"""

from itertools import pairwise

import torch

from shardstep.rules.backends.blocks import join_lines, no_lines
from shardstep.rules.backends.evaluation import exactly
from shardstep.rules.binding import Binding, Lines
from shardstep.rules.host import HostPlan, HostTable, write_states
from shardstep.rules.scalars import compile_scalars
from shardstep.rules.view import view_of


def run_in_parts(phases, arrays, hypers, make, places=(), *, compute, offset=0, low=None):
    """Update ``arrays`` (in their own shapes) in place; ``places``: where the tensor is cut.

    ``make``: ``compile_phase`` of a back end. Where sums over the tensor are made, cuts must be at blocks.
    """
    with exactly():
        _run_in_parts(phases, arrays, hypers, make, places, compute, offset, low)


def _run_in_parts(phases, arrays, hypers, make, places, compute, offset, low):
    shape, shapes = tuple(arrays["param"].shape), phases.program.shapes
    view, plan = view_of(shape), HostPlan(phases, compute)
    flat = {name: array.view(-1) for name, array in arrays.items() if shapes[name] == "element"}
    cuts = list(pairwise([0, *sorted(places), view.numel]))
    counts = {i: line.operation for i, line in enumerate(phases.program.instructions)}
    counts = {i: float(getattr(view, name)) for i, name in counts.items() if name in ("numel", "rows", "columns")}
    states = [{name: a.clone() for name, a in arrays.items() if shapes[name] != "element"} for _ in cuts]
    table, knowns = HostTable(plan, view, hypers), [dict(counts) for _ in states]
    ranks = [table.add(state, known) for state, known in zip(states, knowns, strict=True)]
    stored = tuple((name, array.dtype) for name, array in flat.items())
    for number, phase in enumerate(phases.phases):
        last = number == len(phases.phases) - 1
        kernel = make(phase, Binding(compute, stored, low.dtype if last and low is not None else None))
        made = []
        for (start, stop), rank, known in zip(cuts, ranks, knowns, strict=True):
            table.advance(number)
            scalars = compile_scalars(phases.program, phase.scalars)(hypers, known)
            run = {name: array[start:stop] for name, array in flat.items()}
            lines = Lines(view, start, table.vectors(rank, phase.vectors)) if phase.has_lines else None
            part = None if not last or low is None else low[start:stop]
            made.append(kernel(run, scalars, offset=offset + start, low=part, lines=lines))
        for index, (_, value) in enumerate(phase.sums):
            whole = joined(phase.reductions[index], [parts[index] for parts in made], cuts, view)
            for rank in ranks:
                table.take(rank, value, whole)
    table.advance(len(phases.phases))
    write_states(table.store())
    for name in states[0]:
        assert all(bytes_of(state[name]) == bytes_of(states[0][name]) for state in states)
        arrays[name].copy_(states[0][name])


def joined(line, parts, cuts, view):
    """What the parts of a reduction are together."""
    if line.type.shape == "tensor":
        return torch.cat(parts)
    whole = no_lines(line.operation, view.lines(line.type.shape))
    for values, (start, stop) in zip(parts, cuts, strict=True):
        join_lines(line.operation, whole[view.touched(line.type.shape, start, stop)], values.numpy())
    return torch.from_numpy(whole)


def bytes_of(values):
    return values.nan_to_num(nan=123.0).contiguous().view(-1).view(torch.uint8).tolist()
