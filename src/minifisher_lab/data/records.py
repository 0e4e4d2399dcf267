"""The records that loading a dataset returns, the types in between, and the errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.generic]
Arrays: TypeAlias = dict[str, Array]
"""The decoded arrays of one dataset by name. These are checked and stored."""

Files: TypeAlias = dict[str, bytes]
"""The files of a source: contents by path."""


class WrongData(ValueError):  # noqa: N818 - the name says what it is
    """The files are damaged, or have another format or other contents than expected."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever decoding foreign bytes raises into WrongData: `what` and the reason.

    numpy, scipy, Pillow, tarfile, zipfile, zlib and pickle raise some twenty kinds of exceptions on damaged
    files, and their next releases may raise others.
    """
    try:
        yield
    except WrongData:
        raise
    except Exception as error:
        raise WrongData(f"{what}: {str(error) or type(error).__name__}") from error


class DataMissing(LookupError):  # noqa: N818
    """The dataset has not been fetched to this machine yet."""


class DataUnavailable(RuntimeError):  # noqa: N818
    """No source delivered the dataset; the message lists what was tried."""


MIB = 2**20


@dataclass(frozen=True)
class Format:
    """How one family of files becomes arrays."""

    members: str  # a regular expression that the paths of the needed files end with
    decoder: Callable[[Files], Arrays]
    limit: int = 64 * MIB  # bytes of the needed files, and of the arrays; more would be another file

    def decode(self, files: Files) -> Arrays:
        """The arrays; WrongData for any files that are not as expected."""
        with refusing("the files have another format than expected"):
            return self.decoder(files)


@dataclass(frozen=True)
class Dataset:
    """Images and their labels. A dataset without labels has `classes` 0 and only zeros as targets."""

    name: str
    classes: int
    train_inputs: npt.NDArray[np.float32]  # [N, C, H, W], in [0, 1]
    train_targets: npt.NDArray[np.int64]  # [N]
    test_inputs: npt.NDArray[np.float32]  # [M, C, H, W], in [0, 1]
    test_targets: npt.NDArray[np.int64]  # [M]


@dataclass(frozen=True)
class Table:
    """Rows of numbers, as they were measured. `classes` is 0 for a regression."""

    name: str
    classes: int
    train_inputs: npt.NDArray[np.float32]  # [N, columns]
    train_targets: npt.NDArray[np.generic]  # int64 [N], or float32 [N, 1] for a regression
    test_inputs: npt.NDArray[np.float32]
    test_targets: npt.NDArray[np.generic]


@dataclass(frozen=True)
class Graph:
    """A citation network with the public split. A node without a label has target -1."""

    name: str
    classes: int
    features: npt.NDArray[np.float32]  # [nodes, features]
    edges: npt.NDArray[np.int64]  # [2, E]: each undirected edge once, the lower node first
    targets: npt.NDArray[np.int64]  # [nodes]
    train: npt.NDArray[np.int64]  # node numbers
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order."""

    name: str
    documents: tuple[str, ...]
