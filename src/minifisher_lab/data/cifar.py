"""CIFAR-10 and CIFAR-100: the official pickled batches, and CIFAR-10 as large PNGs with one image per row."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from minifisher_lab.data import pickles
from minifisher_lab.data.archives import named
from minifisher_lab.data.records import MIB, Array, Arrays, Files, Format, WrongData, refusing

BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

IMAGES = 10_000  # in one file of CIFAR-10
LIMIT = 256 * MIB  # 60,000 images have 176 MiB


def _official(files: Files, names: Sequence[str], label_key: str) -> tuple[Array, Array]:
    batches = [pickles.loads(named(files, name)) for name in names]
    if not all(isinstance(batch, dict) and {"data", label_key} <= batch.keys() for batch in batches):
        raise WrongData(f"not CIFAR batches: {', '.join(names)} lack data or {label_key}")
    inputs = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    targets = np.concatenate([batch[label_key] for batch in batches])
    return inputs.astype(np.uint8), targets.astype(np.uint8)


def _decode_10(files: Files) -> Arrays:
    return _arrays(_official(files, BATCHES, "labels"), _official(files, ["test_batch"], "labels"))


def _decode_100(files: Files) -> Arrays:
    return _arrays(_official(files, ["train"], "fine_labels"), _official(files, ["test"], "fine_labels"))


def _decode_png(files: Files) -> Arrays:
    train = np.concatenate([_rows(named(files, f"{name}.png")) for name in BATCHES])
    test = _rows(named(files, "test_batch.png"))
    return _arrays(
        (train, _labels(named(files, "train_lables.json"))),  # spelled so in the package
        (test, _labels(named(files, "test_lables.json"))),
    )


def _rows(data: bytes) -> Array:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the PNG is large, but no attack
    try:
        with refusing("damaged PNG"), Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width != 32 * 32 or image.height > IMAGES:
                raise WrongData(
                    f"a PNG of {image.height} rows of {image.width} pixels, not of 32 x 32 pixels"
                )
            pixels = np.asarray(image.convert("RGB"))  # [N, 1024, 3]
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return np.ascontiguousarray(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


def _labels(data: bytes) -> Array:
    return np.array(json.loads(data), np.uint8)


def _arrays(train: tuple[Array, Array], test: tuple[Array, Array]) -> Arrays:
    return {
        "train_inputs": train[0],
        "train_targets": train[1],
        "test_inputs": test[0],
        "test_targets": test[1],
    }


CIFAR10 = Format(r"data_batch_\d|test_batch", _decode_10, LIMIT)
CIFAR10_PNG = Format(r"(data_batch_\d|test_batch)\.png|(train|test)_lables\.json", _decode_png, LIMIT)
CIFAR100 = Format(r"train|test", _decode_100, LIMIT)
