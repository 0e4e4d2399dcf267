"""The cache: one .npz file per dataset, never half written."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch

from minifisher_lab import files
from minifisher_lab.data.archives import check_zip
from minifisher_lab.data.records import MIB, Arrays, DataMissing, WrongData, refusing


def folder() -> Path:
    """The folder in the variable MINIFISHER_DATA if that is set, else the platform's cache folder."""
    return Path(os.environ.get("MINIFISHER_DATA") or pooch.os_cache("minifisher"))


def path(name: str) -> Path:
    """Where the arrays of a dataset are stored."""
    return folder() / f"{name}.npz"


def digest(arrays: Arrays) -> str:
    """The sha256 of the arrays' names, dtypes, shapes and bytes, whatever files they came from."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def write(name: str, arrays: Arrays) -> Path:
    """Store the arrays; readers see the old file or the new one, never a part of it."""
    target = path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.replaced(target) as file:
        np.savez(file, allow_pickle=False, **arrays)
    return target


def unchecked(_arrays: Arrays) -> None:
    """Accepts any arrays."""


def read(name: str, check: Callable[[Arrays], None] = unchecked, limit: int = 512 * MIB) -> Arrays:
    """The stored arrays. DataMissing if there are none, or if they are not what `check` expects."""
    source = path(name)
    if not source.exists():
        raise DataMissing(f"{name} is not on this machine yet ({source}): run `minifisher data get {name}`")
    try:
        with refusing("not a file of arrays"):
            arrays = _arrays(source, limit)
            check(arrays)
            return arrays
    except WrongData as error:
        raise DataMissing(
            f"{source} is damaged ({error}): delete it and run `minifisher data get {name}`"
        ) from error


def _arrays(source: Path, limit: int) -> Arrays:
    with zipfile.ZipFile(source) as packed:
        check_zip(packed, limit)
    with np.load(source, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}
