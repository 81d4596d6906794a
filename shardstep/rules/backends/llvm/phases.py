"""From a phase to a kernel: its text, machine code from the cache on disk or made now, and the function in memory."""

from types import ModuleType
from typing import Final

from shardstep.rules import cache
from shardstep.rules.backends.llvm.body import Job
from shardstep.rules.backends.llvm.kernel import LlvmKernel
from shardstep.rules.backends.llvm.row import layout_of
from shardstep.rules.backends.llvm.target import TargetUnsupported
from shardstep.rules.backends.llvm.text import module_text
from shardstep.rules.binding import Binding
from shardstep.rules.ir import Phase

_FORMAT: Final = "1"
"""Of what is cached."""


def compile_phase(phase: Phase, binding: Binding, *, target: str | None = None) -> LlvmKernel:
    """Machine code for a phase: from the cache on disk, or made now.

    ``target``: a lesser machine to make it for, "sse2", "avx2" or "avx512"; the bits are the same. Raises
    TargetUnsupported where LLVM cannot, and RuleError for a phase that is not one of elements.
    """
    compiler = _door()
    job, machine = _job(phase, binding), compiler.find_target(target)
    text = module_text(job, machine.x86)
    key = cache.key(_FORMAT, compiler.VERSIONS, machine.cpu, machine.features, text)
    code = cache.fetch(key, lambda: compiler.object_code(text, machine))
    return LlvmKernel(job, compiler.Loaded(code, "run"))


def to_llvm(phase: Phase, binding: Binding, *, target: str | None = None) -> str:
    """What LLVM is given, to read. Raises as `compile_phase` does."""
    return module_text(_job(phase, binding), _door().find_target(target).x86)


def to_assembly(phase: Phase, binding: Binding, *, target: str | None = None) -> str:
    """What LLVM makes of it, to read. Raises as `compile_phase` does."""
    compiler = _door()
    return str(compiler.assembly(to_llvm(phase, binding, target=target), compiler.find_target(target)))


def _door() -> ModuleType:
    try:
        from shardstep.rules.backends.llvm import compiler  # takes some 30 ms, and not everybody compiles
    except (ImportError, OSError) as error:
        raise TargetUnsupported(
            f"expected llvmlite to load, got {error}; reinstall llvmlite, or use the reference back end"
        ) from error
    return compiler


def _job(phase: Phase, binding: Binding) -> Job:
    return Job(phase, binding, layout_of(phase, binding))
