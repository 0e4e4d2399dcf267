"""How numba compiles the kernels of this package; needs numba.

A compiled kernel must call no other compiled function: it inlines all of them (`inlined`). Otherwise two
processes step differently in the last bits. A function that is called exists twice in machine code: compiled
by itself, and once more, optimised again, inside the kernel that calls it. The process that compiles both
runs the first; a process that reads the kernel from the cache runs the second.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core import caching
from numba.core.compiler import Compiler

from minifisher.kernels.simd import LANES, load, store

_CacheFile: Any = caching.IndexDataCacheFile  # numba has no annotations
_FunctionCache: Any = caching.FunctionCache
_Compiler: Any = Compiler


class _WithoutOverlap(_Compiler):  # type: ignore[misc]
    """Compiles a kernel whose arguments share no memory that it writes to.

    Otherwise LLVM compiles every loop twice, as vectors and number by number, and runs the second where two
    arrays lie within some hundred bytes of each other. The two add up in different orders: the last bits of a
    small network's step would depend on where its tensors happen to lie.
    """

    def define_pipelines(self) -> Any:
        self.state.flags.noalias = True
        return super().define_pipelines()


_OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "nsz"},
    "nogil": True,
    "error_model": "numpy",
    "pipeline_class": _WithoutOverlap,
}


def compiled(function: Callable[..., Any], *, reorders: bool = True) -> Any:
    """`function` compiled at its first call, and cached on disk if possible.

    It releases the interpreter lock. NaN and infinity are handled as IEEE 754 says. Sums and products may be
    reordered, which vectorises sums; without `reorders` every operation is done as it is written.
    """
    options = _OPTIONS if reorders else {**_OPTIONS, "fastmath": False}
    kernel = numba.njit(**options)(function)
    try:
        kernel._cache = _Cache(function)
    except (RuntimeError, OSError) as error:  # numba finds no folder that it can write to
        _warn_once(error)
    return kernel


compiled_as_written: Callable[[Callable[..., Any]], Any] = partial(compiled, reorders=False)


def inlined(function: Callable[..., Any]) -> Any:
    """`function` inlined into the kernels that call it; not compiled by itself, which would take time."""
    return numba.njit(inline="always", **_OPTIONS)(function)


# ---- the cache on disk ----


class _CheckedFile(_CacheFile):  # type: ignore[misc]
    """A cache file with a checksum: damaged machine code could end the process, or compute wrong numbers."""

    def _dump(self, content: Any) -> bytes:
        data: bytes = super()._dump(content)
        return data + hashlib.sha256(data).digest()

    def _load_data(self, name: str) -> Any:
        data = Path(self._data_path(name)).read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise ValueError(f"{name} is damaged")
        return super()._load_data(name)


class _Cache(_FunctionCache):  # type: ignore[misc]
    """Numba's cache on disk, but what goes wrong with it is a warning and not an exception."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        # Numba looks at the file of the kernel only, not at those of the functions that it inlines.
        self._cache_file = _CheckedFile(self._cache_path, self._impl.filename_base, _hash_of_sources())

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception as error:
            _warn_once(error, self._cache_path)
            with suppress(OSError):
                self.flush()  # an empty index, so that the kernel is saved again
            return None

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)
        except Exception as error:
            _warn_once(error, self._cache_path)
            self.disable()


@lru_cache(maxsize=1)
def _hash_of_sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


_warned = False


def _warn_once(error: Exception, folder: str = "") -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"numba's cache of compiled kernels{folder and f' in {folder}'} cannot be used "
            f"({type(error).__name__}: {error}). Kernels are compiled in memory, which takes some seconds in "
            "each process. Cure: make room there or delete the folder, or set NUMBA_CACHE_DIR to a folder "
            "that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )


# ---- whether it works at all ----


@compiled
def _double(vectors: Any) -> None:
    store(vectors, 0, load(vectors, 0) + load(vectors, 0))


def check() -> None:
    """Raise an exception if this installation of numba cannot compile."""
    vectors = np.ones((1, LANES), np.float32)
    _double(vectors)
    if not (vectors == 2).all():
        raise RuntimeError("a kernel gave a wrong result")
