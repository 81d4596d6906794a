"""The one door to llvmlite: text in, machine code out, and machine code into memory. Import it when it is needed."""

import itertools
import platform
from functools import cache
from typing import Any, Final

import llvmlite  # type: ignore[import-untyped]
import llvmlite.binding as llvm  # type: ignore[import-untyped]

from shardstep.rules.backends.llvm.target import NAMED, Target, TargetUnsupported

VERSIONS: Final = f"llvmlite {llvmlite.__version__}, LLVM {'.'.join(map(str, llvm.llvm_version_info))}"
"""Whose code it is: the same text may become other instructions with another version."""

_OPTIMISATION: Final = 2
"""How hard to try at choosing instructions. There are no passes over the text before."""

_numbers = itertools.count()


@cache
def find_target(name: str | None) -> Target:
    """The machine that this runs on, or a lesser one by name. Raises TargetUnsupported."""
    try:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        x86 = platform.machine() in ("x86_64", "AMD64")
        host = llvm.get_host_cpu_features()
        if name is None:
            target = Target(llvm.get_host_cpu_name(), host.flatten(), x86)
        elif x86 and name in NAMED and host.get(NAMED[name][1], False):
            target = Target(NAMED[name][0], "", x86)
        else:
            raise TargetUnsupported(
                f"expected a target that this {platform.machine()} machine can run, one of "
                f"{', '.join(NAMED)} on x86, got {name!r}; leave it out to compile for the machine itself"
            )
        _machine(target)
    except RuntimeError as error:
        raise TargetUnsupported(
            f"expected LLVM to know this {platform.machine()} machine, got {error}; use the reference back end"
        ) from error
    return target


@cache
def _machine(target: Target) -> Any:
    native = llvm.Target.from_default_triple()
    return native.create_target_machine(target.cpu, target.features, opt=_OPTIMISATION, jit=True)


def object_code(text: str, target: Target) -> bytes:
    """Relocatable machine code of a module."""
    return bytes(_machine(target).emit_object(_parsed(text)))


def assembly(text: str, target: Target) -> str:
    """The same, for people."""
    return str(_machine(target).emit_assembly(_parsed(text)))


def _parsed(text: str) -> Any:
    module = llvm.parse_assembly(text)
    module.verify()
    return module


@cache
def _linker() -> Any:
    return llvm.create_lljit_compiler()


class Loaded:
    """Machine code in memory, for as long as this lives."""

    def __init__(self, code: bytes, function: str) -> None:
        library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process().export_symbol(function)
        self._tracker = library.link(_linker(), f"shardstep.{next(_numbers)}")
        self.address: int = self._tracker[function]
