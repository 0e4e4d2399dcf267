"""How numba compiles the kernels of this package; needs numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# NOTE without the flag "contract": with fused multiply-adds, the process that compiles a kernel and one that
# reads it from the cache got different last bits, and a resumed run was not the same to the last bit.
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
