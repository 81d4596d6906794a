"""How the examples are run: as modules, in this process or on warm ranks, and as scripts under torchrun."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]


def path_of(name: str) -> Path:
    return ROOT / "examples" / f"{name}.py"


def example(name: str) -> ModuleType:
    """A file of examples/, executed anew but for what it does as a script."""
    spec = importlib.util.spec_from_file_location(name, path_of(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(**options: Any) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def under_torchrun(name: str, **options: Any) -> dict[str, Any]:
    """The last line that the script prints on two ranks, which torchrun starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(path_of(name)), *arguments(**options)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
