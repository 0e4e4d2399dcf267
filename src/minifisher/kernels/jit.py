"""How loops are compiled; needs numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# NOTE without "contract": fused multiply-adds came out otherwise in the process that compiled than in those
# that read the cache, and a resumed run was no longer bit for bit the same.
_OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "nsz"}, "nogil": True, "error_model": "numpy"}


def compiled(function: Callable[..., Any]) -> Any:
    """`function` compiled at its first call and cached on disk where that can be; without interpreter lock.

    Sums may be reordered, which is what lets them be vectorised; NaN and infinity keep their meaning.
    """
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither the package's folder nor a cache folder of the user can be written to
        return numba.njit(**_OPTIONS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """`function` as a part of the compiled one that calls it: by itself it would take time to compile."""
    return numba.njit(inline="always", **_OPTIONS)(function)
