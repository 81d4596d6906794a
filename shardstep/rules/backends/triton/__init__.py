"""The Triton back end: one phase as one GPU kernel, with the bits that every other back end gives.

    source(phase, binding)              the kernel as the text of a Python module
    compile_phase(phase, binding)       the kernel, called on the tensors of a CUDA device
    compile_text(phase, binding, arch)  what it is compiled to (ttir, llir, ptx), on a machine with or without a GPU

``text`` writes the kernel, ``operations`` the expression of each instruction, ``prelude`` the functions that Triton
has no exact word for; ``kernel`` is the only one that imports triton, and not before it is asked for a kernel.

Exact means: division and square root are the correctly rounded ones, an fma is written only where the program has
one and no other is made (``enable_fp_fusion=False``), bfloat16 is rounded in integers, nothing of libdevice is
called, and a sum is added in its own order, whatever the width of the machine.
"""

from shardstep.rules.backends.triton.kernel import compile_phase, compile_text
from shardstep.rules.backends.triton.text import source

__all__ = ["compile_phase", "compile_text", "source"]
