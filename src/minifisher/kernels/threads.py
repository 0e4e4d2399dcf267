"""Compiled loops that release the interpreter lock, shared out over as many threads as torch uses."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

# A pool of numba's own would spin on the cores that torch's pool computes on, or abort the process where
# two threads take a step at once.

# Torch's pool in turn spins for some milliseconds after its last work, and keeps ours from that core: whoever
# has a core takes the next part, instead of each thread having its share.
_PARTS_A_THREAD = 8


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # A forked process inherits the pool but not its threads: hence the process in the key.
    return ThreadPoolExecutor(threads, thread_name_prefix=f"minifisher-{process}")


def in_parts(loop: Callable[[int, int], float], count: int, least: int) -> float:
    """The sum of loop(start, stop) over consecutive parts of range(count), none shorter than `least`."""
    threads = torch.get_num_threads()
    parts = 1 if threads == 1 else max(1, min(threads * _PARTS_A_THREAD, count // least))
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
        if not other.cancel():  # one that has not begun would find nothing left
            other.result()
    return sum(sums)
