"""The LLVM back end: a phase becomes text of LLVM's language, machine code, and a function on flat arrays.

In the order in which a phase flows: row (what a call is given), conversions, dynamic8 and text (the code), target and
compiler (the one door to llvmlite, opened by the first compilation), phases (all of that in turn), kernel and threads
(the call). Its bits are those that `rules.ir` fixes, whatever the machine, the width of its vectors, the number of
threads, and the places where arrays begin and end. There is no fast-math, no contraction and no pass pipeline: what
is written is what is executed.
"""

from shardstep.rules.backends.llvm.kernel import LlvmKernel, Row
from shardstep.rules.backends.llvm.phases import compile_phase, to_assembly, to_llvm
from shardstep.rules.backends.llvm.target import TargetUnsupported

__all__ = ["LlvmKernel", "Row", "TargetUnsupported", "compile_phase", "to_assembly", "to_llvm"]
