"""The works of Shakespeare, one document per play or poem."""

from __future__ import annotations

import numpy as np

from minifisher_lab.data.records import Arrays, Files, Format, WrongData

WORKS = 42


def _decode(files: Files) -> Arrays:
    works = [files[path] for path in sorted(files, key=lambda path: path.rpartition("/")[2])]
    if len(works) != WORKS:
        raise WrongData(f"{len(works)} texts named *_gut.txt instead of {WORKS}")
    return {
        "text": np.frombuffer(b"".join(works), np.uint8),
        "lengths": np.array([len(work) for work in works], np.int64),
    }


def documents(arrays: Arrays) -> tuple[str, ...]:
    """The stored bytes as strings."""
    ends = np.cumsum(arrays["lengths"])[:-1]
    return tuple(part.tobytes().decode("latin1") for part in np.split(arrays["text"], ends))


SHAKESPEARE = Format(r"shksprdata/texts/\w+_gut\.txt", _decode)
