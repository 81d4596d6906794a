"""The doors of the house: who may touch what is outside. import-linter holds the floors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "shardstep"
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Every dotted name that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names_used(file: Path) -> Iterator[str]:
    """Every dotted name that a file imports or spells out as attributes."""
    yield from imports(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def touches(file: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in names_used(file))


def named(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def test_torch_distributed_has_one_door() -> None:
    assert [named(file) for file in FILES if touches(file, "torch.distributed")] == ["collectives/wire.py"]


@pytest.mark.parametrize(
    ("package", "door"),
    [
        ("llvmlite", "rules/backends/llvm/compiler.py"),
        ("triton", "rules/backends/triton/kernel.py"),
        ("safetensors", "sharding/weights.py"),
    ],
)
def test_what_is_outside_has_one_door(package: str, door: str) -> None:
    imported = {named(file) for file in FILES for name in imports(file) if name.split(".")[0] == package}
    assert imported == {door}


@pytest.mark.parametrize("package", ["pickle", "cloudpickle", "dill", "marshal", "shelve", "torch.load"])
def test_nothing_executes_on_load(package: str) -> None:
    assert [named(file) for file in FILES if touches(file, package)] == []


def test_no_object_collectives() -> None:
    """They unpickle what peers send."""
    door = (PACKAGE / "collectives" / "wire.py").read_text(encoding="utf-8")
    calls = {node.attr for node in ast.walk(ast.parse(door)) if isinstance(node, ast.Attribute)}
    assert not [name for name in calls if "object" in name]
