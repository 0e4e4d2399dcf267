"""SVHN: house numbers cropped to 32 x 32, in MATLAB's format."""

from __future__ import annotations

import io

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from minifisher_lab.data.archives import named
from minifisher_lab.data.records import Arrays, Files, Format, WrongData


def _decode(files: Files) -> Arrays:
    arrays: Arrays = {}
    for part in ("train", "test"):
        content = _content(named(files, f"{part}_32x32.mat"))
        # The file has the images as [H, W, C, N], and the digit 0 has the label 10.
        arrays[f"{part}_inputs"] = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1))
        arrays[f"{part}_targets"] = (content["y"].reshape(-1) % 10).astype(np.uint8)
    return arrays


def _content(data: bytes) -> Arrays:
    try:
        content: Arrays = loadmat(io.BytesIO(data), variable_names=["X", "y"])
    except (MatReadError, ValueError, NotImplementedError, OSError) as error:
        raise WrongData(f"not a MATLAB 5 file: {error}") from error
    if not {"X", "y"} <= content.keys():
        raise WrongData("the MATLAB file lacks the variables X and y")
    return content


SVHN = Format(r"(train|test)_32x32\.mat", _decode)
