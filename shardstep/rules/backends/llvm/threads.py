"""Calls cut over the threads of one pool, which all kernels share. The order of calls never shows in the bits."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

Call = tuple[bytes, int]
"""The arguments of one call: a table and its number of rows."""


def run_all(function: Callable[[bytes, int], object], calls: Iterable[Call], threads: int) -> None:
    """Every call once, by this thread and up to ``threads`` - 1 others; each takes the next one when it is free."""
    waiting = deque(calls)

    def work() -> None:
        while True:
            try:
                table, count = waiting.popleft()
            except IndexError:
                return
            function(table, count)

    helpers = [_pool().submit(work) for _ in range(min(threads, len(waiting)) - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="shardstep")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
