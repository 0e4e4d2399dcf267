"""SVHN: house numbers cropped to 32 x 32, in MATLAB's format."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import scipy  # imports its parts at their first use

from minifisher_lab.data.archives import bounded, named
from minifisher_lab.data.records import MIB, Arrays, Files, Format, WrongData, refusing

HEADER, TAG, COMPRESSED = 128, 8, 15  # of MATLAB 5 files: bytes of the header, of a tag, a type of data
LIMIT = 256 * MIB  # the training images have 215 MiB


def _decode(files: Files) -> Arrays:
    arrays: Arrays = {}
    for part in ("train", "test"):
        content = _content(named(files, f"{part}_32x32.mat"))
        # The file has the images as [H, W, C, N], and the digit 0 has the label 10.
        arrays[f"{part}_inputs"] = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1))
        arrays[f"{part}_targets"] = (content["y"].reshape(-1) % 10).astype(np.uint8)
    return arrays


def _content(data: bytes) -> Arrays:
    with refusing("not a MATLAB 5 file"):
        _check_size(data)
        content: Arrays = scipy.io.loadmat(io.BytesIO(data), variable_names=["X", "y"])
        return content


def _check_size(data: bytes) -> None:
    """Refuse a small file that would become a large array. A variable may be compressed, each for itself."""
    variables = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(io.BytesIO(data))}
    if not {"X", "y"} <= variables.keys():
        raise WrongData("the MATLAB file lacks the variables X and y")
    for name, (shape, kind) in variables.items():
        if math.prod(shape) > LIMIT or (name == "X" and kind != "uint8"):
            raise WrongData(f"the MATLAB file has a variable {name} of shape {shape} and type {kind}")
    start = HEADER
    while start + TAG <= len(data):
        kind, size = struct.unpack_from("<II", data, start)
        if kind == COMPRESSED:
            stream = io.BytesIO(zlib.decompressobj().decompress(data[start + TAG :][:size], LIMIT + 1))
            bounded(stream, LIMIT)
        start += TAG + size


SVHN = Format(r"(train|test)_32x32\.mat", _decode, 2 * LIMIT)
