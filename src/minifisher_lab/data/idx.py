"""IDX, the format of MNIST: a magic number with the rank, the sizes, then bytes, all big-endian."""

from __future__ import annotations

import gzip
import zlib

import numpy as np
import numpy.typing as npt

from minifisher_lab.data.records import Arrays, Files, Format, WrongData

UNSIGNED_BYTES = 8


def parse(data: bytes) -> npt.NDArray[np.uint8]:
    """One IDX file of unsigned bytes, compressed with gzip or not."""
    plain = _unpacked(data)
    if len(plain) < 4 or plain[:2] != b"\0\0" or plain[2] != UNSIGNED_BYTES:
        raise WrongData(f"not an IDX file of unsigned bytes: it starts with {plain[:4]!r}")
    start = 4 + 4 * plain[3]
    shape = np.frombuffer(plain[4:start], ">u4").astype(int)
    if len(plain) - start != shape.prod():
        raise WrongData(f"IDX file announces shape {shape.tolist()} but holds {len(plain) - start} bytes")
    return np.frombuffer(plain, np.uint8, offset=start).reshape(shape)


def _unpacked(data: bytes) -> bytes:
    try:
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, OSError, zlib.error) as error:
        raise WrongData(f"damaged gzip file: {error}") from error


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
