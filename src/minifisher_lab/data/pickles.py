"""Read old pickles of numbers safely: any class or function outside a short list is refused."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
from typing import Any

import numpy as np

from minifisher_lab.data.records import WrongData, refusing

_reconstruct = np.empty(0).__reduce__()[0]  # its module differs between releases of numpy


class SparseRows:
    """Replaces scipy.sparse.csr_matrix, whose attributes change between releases; keeps the pickled ones."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes that the pickle holds."""
        self.state = state


ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("scipy.sparse.csr", "csr_matrix"): SparseRows,
    ("scipy.sparse._csr", "csr_matrix"): SparseRows,
    ("collections", "defaultdict"): collections.defaultdict,
    ("__builtin__", "list"): list,
    ("builtins", "list"): list,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise WrongData(f"the pickle names {module}.{name}, which no data file needs: refused")
        return ALLOWED[module, name]


def loads(data: bytes) -> Any:
    """The content of a Python 2 pickle of arrays, sparse matrices, lists and dictionaries."""
    with refusing("damaged pickle"):
        _check_memo(data)
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()


def _check_memo(data: bytes) -> None:
    """Refuse a place in the memo that no pickler writes: Python makes room for all places below it."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise WrongData(f"damaged pickle: place {argument} in the memo after {count} operations")
