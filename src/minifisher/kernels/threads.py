"""Runs compiled loops, which release the interpreter lock, on as many threads as torch uses.

Torch's threads wait actively for some milliseconds after their last work. Other threads have no core
meanwhile: with a pool of our own, two threads took as long as one. So the loops run on torch's threads where
they can be reached, which is on Linux. Numba's threads wait actively as well, and numba aborts the process
where two Python threads enter them at once.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from minifisher.kernels import PROCESS

_PARTS_PER_THREAD = 4  # so that a thread whose core does other work leaves parts to the others
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_parallel(loop: Callable[[int, int], float], count: int, smallest: int) -> float:
    """Call loop(start, stop) for consecutive parts of range(count), each at least `smallest` long.

    Returns the sum of what the calls return. Raises the first error of a call.
    """
    threads = torch.get_num_threads()
    parts = 1 if threads == 1 else max(1, min(threads * _PARTS_PER_THREAD, count // smallest))
    if parts == 1:
        return loop(0, count)
    edges = [count * part // parts for part in range(parts + 1)]
    pending, sums = deque(range(parts)), [0.0] * parts
    errors: list[BaseException] = []

    def work(_: object = None) -> None:
        while pending and not errors:
            try:
                part = pending.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                sums[part] = loop(edges[part], edges[part + 1])
            except BaseException as error:
                errors.append(error)

    run_on_torch_threads = _openmp_region()
    # In a forked process OpenMP would wait for threads that are not there.
    if run_on_torch_threads is not None and os.getpid() == PROCESS:
        run_on_torch_threads(_FUNCTION(work), None, threads, 0)
    else:
        pool = _pool(os.getpid(), threads)
        others = [pool.submit(work) for _ in range(min(threads, parts) - 1)]
        work()
        wait([other for other in others if not other.cancel()])  # one that did not start finds no part left
    if errors:
        raise errors[0]
    return sum(sums)


@lru_cache(maxsize=1)
def _openmp_region() -> Any:
    """f(function, its argument, threads, 0): a parallel region of the OpenMP that torch uses; None elsewhere.

    GCC's library has it, and so has Intel's for programs compiled by GCC.
    """
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        region = torch_library.GOMP_parallel  # looked up in what torch was linked with
    except (OSError, AttributeError):
        return None
    region.argtypes, region.restype = (_FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return region


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # The process is in the key because a forked process inherits the pool, but not its threads.
    return ThreadPoolExecutor(threads, thread_name_prefix=f"minifisher-{process}")
