"""How numba compiles the kernels of this package; needs numba.

A compiled kernel must call no other compiled function: it inlines all of them (`inlined`). Otherwise two
processes step differently in the last bits. A function that is called exists twice in machine code: compiled
by itself, and once more, optimised again, inside the kernel that calls it. The process that compiles both
runs the first; a process that reads the kernel from the cache runs the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

_OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "nsz"}, "nogil": True, "error_model": "numpy"}


def compiled(function: Callable[..., Any]) -> Any:
    """`function` compiled at its first call, and cached on disk if possible.

    It releases the interpreter lock. Sums may be reordered, which vectorises them. NaN and infinity are
    handled as IEEE 754 says.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder is writable
        return numba.njit(**_OPTIONS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """`function` inlined into the kernels that call it; not compiled by itself, which would take time."""
    return numba.njit(inline="always", **_OPTIONS)(function)
