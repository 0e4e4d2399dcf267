"""Compiled loops that release the interpreter lock, shared out over as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

# A pool of numba's own would spin on the cores that torch's pool computes on, or abort the process where
# two threads take a step at once.


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # A forked process inherits the pool but not its threads: hence the process in the key.
    return ThreadPoolExecutor(threads, thread_name_prefix=f"minifisher-{process}")


def in_parts(loop: Callable[[int, int], float], count: int, least: int) -> float:
    """The sum of loop(start, stop) over consecutive parts of range(count), none shorter than `least`."""
    parts = max(1, min(torch.get_num_threads(), count // least))
    edges = [count * part // parts for part in range(parts + 1)]
    if parts == 1:
        return loop(0, count)
    pool = _pool(os.getpid(), torch.get_num_threads())
    others = [pool.submit(loop, edges[part], edges[part + 1]) for part in range(1, parts)]
    return loop(0, edges[1]) + sum(other.result() for other in others)
