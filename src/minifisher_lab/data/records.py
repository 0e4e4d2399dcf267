"""What loading a dataset gives: plain frozen records of numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.generic]
Arrays: TypeAlias = dict[str, Array]
"""The decoded arrays of one dataset by name: what is checked and stored."""

Files: TypeAlias = dict[str, bytes]
"""What a source delivered: contents by path."""


class WrongData(ValueError):  # noqa: N818 - the name says what it is
    """Files that are not what they should be: broken, of another kind, or with other contents.

    A decoder may raise any ValueError; this one says more.
    """


class DataMissing(LookupError):  # noqa: N818
    """The dataset has not been fetched to this machine yet."""


class DataUnavailable(RuntimeError):  # noqa: N818
    """No source delivered the dataset; the message lists what was tried."""


@dataclass(frozen=True)
class Format:
    """How one family of files becomes arrays."""

    members: str  # a regular expression that the paths of the needed files end with
    decode: Callable[[Files], Arrays]


@dataclass(frozen=True)
class Dataset:
    """Images and their labels; `classes` is 0 where there are none, and the targets are then all zero."""

    name: str
    classes: int
    train_inputs: npt.NDArray[np.float32]  # [N, C, H, W], in [0, 1]
    train_targets: npt.NDArray[np.int64]  # [N]
    test_inputs: npt.NDArray[np.float32]  # [M, C, H, W], in [0, 1]
    test_targets: npt.NDArray[np.int64]  # [M]


@dataclass(frozen=True)
class Graph:
    """A citation network with the public split; a node that is in no list has target -1."""

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
