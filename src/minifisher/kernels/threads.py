"""Runs compiled loops, which release the interpreter lock, on as many threads as torch uses."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

# Numba's own thread pool is not used: its threads wait actively on the cores that torch's threads need, and
# it aborts the process where two Python threads enter it at once.

# Torch's threads wait actively for some milliseconds after their last work, and a core that they hold is not
# free for ours. So the work is cut in more parts than threads, and a thread that has a core takes the next.
_PARTS_PER_THREAD = 8


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # The process is in the key because a forked process inherits the pool, but not its threads.
    return ThreadPoolExecutor(threads, thread_name_prefix=f"minifisher-{process}")


def run_parallel(loop: Callable[[int, int], float], count: int, smallest: int) -> float:
    """Call loop(start, stop) for consecutive parts of range(count), each at least `smallest` long.

    Returns the sum of what the calls return.
    """
    threads = torch.get_num_threads()
    parts = 1 if threads == 1 else max(1, min(threads * _PARTS_PER_THREAD, count // smallest))
    if parts == 1:
        return loop(0, count)
    edges = [count * part // parts for part in range(parts + 1)]
    pending, sums = deque(range(parts)), [0.0] * parts

    def work() -> None:
        while True:
            try:
                part = pending.popleft()
            except IndexError:
                return
            sums[part] = loop(edges[part], edges[part + 1])

    pool = _pool(os.getpid(), threads)
    others = [pool.submit(work) for _ in range(min(threads, parts) - 1)]
    work()
    for other in others:
        if not other.cancel():  # a worker that has not started would find no part left
            other.result()
    return sum(sums)
