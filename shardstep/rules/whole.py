"""Updates of whole tensors by the reference back end: for rules with matrix products that cannot be cut into steps."""

from shardstep.rules import noise
from shardstep.rules.backends import reference, rounding
from shardstep.rules.backends.dynamic8 import decoded_states, encode
from shardstep.rules.backends.evaluation import exactly
from shardstep.rules.binding import CODED, check_dtypes, compute_dtype, scale_name
from shardstep.rules.hypers import Hypers, hypers_of, segment_hypers
from shardstep.rules.variants import Variants
from shardstep.types import Segment


def update_whole(variants: Variants, segment: Segment, group: Hypers) -> None:
    """Update one in place."""
    check_dtypes(segment)
    shape, compute = segment.shape or (), compute_dtype(segment.param)
    hypers = {
        **segment_hypers(segment, group),
        **hypers_of(group, segment.step, segment.grad_scale, shape, compute),
    }
    program = variants.program_for(hypers, compute, noise.rounded_dtype(segment))
    arrays = {"param": segment.param.view(shape), "grad": segment.grad.view(shape)}
    states = decoded_states(segment.state)
    arrays |= {name: values.view(shape) for name, values in states.items()} | segment.tensor_state
    new = reference.run_whole(program, arrays, hypers, compute=compute, offset=segment.offset)
    for name, values in new.items():
        if name in segment.state and segment.state[name].dtype in CODED:
            codes, scale = encode(values.view(segment.state[name].shape), segment.state[name].dtype)
            segment.state[name].copy_(codes)
            segment.state[scale_name(name)].copy_(scale)
        else:
            arrays[name].copy_(values)
    if segment.low is not None:
        with exactly():
            rounding.write(rounding.read(segment.param, compute), segment.low)
