"""How a process hears that it ends, and tells the other ranks: an exception that nobody caught, or a clean goodbye.

Holds the side channels of this process. What they carry is decided in `watch`.
"""

import atexit
import multiprocessing.util
import sys
from types import TracebackType

from shardstep.collectives.watch import Watch
from shardstep.collectives.wire import Wire

WATCHES: list[Watch] = []


def start_watch(wire: Wire) -> Watch:
    """The side channel over a wire, until the process ends."""
    if not WATCHES:
        _hook_ends()
    WATCHES.append(Watch(wire))
    return WATCHES[-1]


def tell_failure(error: BaseException) -> None:
    """Tell all ranks that this one ends because of ``error``; for launchers, who catch what ends a rank."""
    for watch in WATCHES:
        watch.tell_failure(error)


def close_watches() -> None:
    """Say goodbye to all ranks."""
    for watch in WATCHES:  # first to all: some may be waiting to hear it
        watch.say_goodbye()
    while WATCHES:
        WATCHES.pop().close()


_hooked = False


def _hook_ends() -> None:
    """Hear of the exception that ends this process, and of its end; once."""
    global _hooked
    if _hooked:
        return
    _hooked, before = True, sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        tell_failure(error)
        before(kind, error, traceback)

    sys.excepthook = excepthook
    multiprocessing.util.Finalize(None, close_watches, exitpriority=100)  # processes of multiprocessing skip atexit
    atexit.register(close_watches)
