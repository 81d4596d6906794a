"""The public face: its names, its tree of errors, and an import that starts nothing."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest

import shardstep
from shardstep import errors

TREE = {
    "ConfigError": ("ShardstepError", "ValueError"),
    "OwnershipError": ("ConfigError",),
    "ArgumentTypeError": ("ConfigError", "TypeError"),
    "MissingKeyError": ("ConfigError", "KeyError"),
    "UnsupportedError": ("ConfigError", "RuntimeError"),
    "RuleError": ("ShardstepError",),
    "FreedParameterError": ("ShardstepError", "RuntimeError"),
    "SequenceError": ("ShardstepError", "RuntimeError"),
    "NonFiniteGradientError": ("ShardstepError", "ArithmeticError"),
    "NonFiniteUpdateError": ("ShardstepError", "ArithmeticError"),
    "CollectiveError": ("ShardstepError", "RuntimeError"),
    "RankMismatchError": ("CollectiveError",),
}

WATCHED_IMPORT = """
import json, sys, threading, subprocess, multiprocessing
started = []
sys.addaudithook(lambda event, args: started.append(event) if event in (
    "subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "socket.bind", "socket.connect",
    "_thread.start_new_thread", "_thread.start_joinable_thread") else None)
import torch
import shardstep
print(json.dumps({
    "threads": threading.active_count(),
    "children": len(multiprocessing.active_children()),
    "process group": torch.distributed.is_initialized(),
    "started": started,
    "compilers": [name for name in ("llvmlite", "llvmlite.binding") if name in sys.modules],
}))
"""


def test_all_is_sorted_and_says_what_there_is():
    assert sorted(shardstep.__all__) == shardstep.__all__
    importable = {
        name for name, value in vars(shardstep).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(shardstep.__all__) == importable | {"optim"}


def test_every_public_name_has_a_docstring():
    callables = [getattr(shardstep, name) for name in shardstep.__all__ if callable(getattr(shardstep, name))]
    assert not [value for value in callables if not inspect.getdoc(value)]


@pytest.mark.parametrize("name", TREE)
def test_the_tree_of_errors(name):
    assert tuple(base.__name__ for base in getattr(errors, name).__bases__) == TREE[name]


def test_every_error_is_in_the_tree_and_public_and_in_the_page_that_draws_it():
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined == {"ShardstepError", *TREE}
    assert defined <= set(shardstep.__all__)
    assert all(name in (errors.__doc__ or "") for name in defined)


def test_import_starts_nothing():
    found = subprocess.run([sys.executable, "-c", WATCHED_IMPORT], capture_output=True, text=True, timeout=60)
    nothing = {"threads": 1, "children": 0, "process group": False, "started": [], "compilers": []}
    assert json.loads(found.stdout) == nothing, found.stderr


@pytest.mark.parametrize("room", ["shardstep.optim", "shardstep.rules", "shardstep.sharding"])
def test_rooms_export_what_they_say(room):
    module = importlib.import_module(room)
    assert all(hasattr(module, name) for name in module.__all__)
