"""The cache: one .npz file per dataset, never half written."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pooch

from minifisher_lab.data.records import Arrays, DataMissing


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
    """Store the arrays atomically: readers see the old file or the new one, never a part of it."""
    target = path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def read(name: str) -> Arrays:
    """The stored arrays. The checksums inside the .npz file reveal a damaged file."""
    source = path(name)
    if not source.exists():
        raise DataMissing(f"{name} is not on this machine yet ({source}): run `minifisher data get {name}`")
    try:
        with np.load(source, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise DataMissing(
            f"{source} is damaged ({error}): delete it and run `minifisher data get {name}`"
        ) from error
