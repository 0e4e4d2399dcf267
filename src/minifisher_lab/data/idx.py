"""IDX, the format of MNIST: a magic number with the rank, the sizes, then bytes, all big-endian."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from minifisher_lab.data.archives import unzipped
from minifisher_lab.data.records import MIB, Arrays, Files, Format, WrongData, refusing

UNSIGNED_BYTES = 8
LIMIT = 64 * MIB  # the training images of MNIST have 45 MiB


def parse(data: bytes) -> npt.NDArray[np.uint8]:
    """One IDX file of unsigned bytes, compressed with gzip or not."""
    with refusing("damaged gzip file"):
        plain = unzipped(data, LIMIT)
    if len(plain) < 4 or plain[:2] != b"\0\0" or plain[2] != UNSIGNED_BYTES:
        raise WrongData(f"not an IDX file of unsigned bytes: it starts with {plain[:4]!r}")
    start = 4 + 4 * plain[3]
    with refusing("not an IDX file"):
        shape = np.frombuffer(plain[4:start], ">u4").tolist()
        if len(plain) - start != math.prod(shape):
            raise WrongData(f"IDX file announces shape {shape} but holds {len(plain) - start} bytes")
        pixels: npt.NDArray[np.uint8] = np.frombuffer(plain, np.uint8, offset=start).reshape(shape)
        return pixels


def _decode(files: Files) -> Arrays:
    arrays: Arrays = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        arrays[f"{part}_inputs"] = parse(_file(files, f"{prefix}-images"))[:, None]  # [N, 1, H, W]
        arrays[f"{part}_targets"] = parse(_file(files, f"{prefix}-labels"))
    return arrays


def _file(files: Files, prefix: str) -> bytes:
    found = [data for path, data in files.items() if path.rpartition("/")[2].startswith(prefix)]
    if not found:
        raise WrongData(f"no file {prefix}-idx?-ubyte; found {sorted(files)}")
    return found[0]


IDX = Format(r"(train|t10k)-(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?", _decode)
