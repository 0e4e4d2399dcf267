"""CURVES: a smooth curve with three random control points, drawn anti-aliased on 28 x 28 pixels."""

from __future__ import annotations

import numpy as np

from minifisher_lab.data.records import Array, Arrays

TRAINING, TEST, SIDE = 20_000, 10_000, 28
STEPS = 96  # points drawn along a curve, at most 0.6 pixels apart
MARGIN, HALF_WIDTH = 3, 0.75  # pixels; ink fades over one pixel at the edge of the stroke


def draw(_arrays: Arrays, seed: int) -> Arrays:
    """Training and test curves; there are no labels, so the targets are zero."""
    generator = np.random.default_rng(seed)
    return {
        "train_inputs": _images(TRAINING, generator),
        "train_targets": np.zeros(TRAINING, np.uint8),
        "test_inputs": _images(TEST, generator),
        "test_targets": np.zeros(TEST, np.uint8),
    }


def _images(count: int, generator: np.random.Generator) -> Array:
    control = generator.uniform(MARGIN, SIDE - 1 - MARGIN, (3, count, 2)).astype(np.float32)
    ink = np.zeros((count, SIDE, SIDE), np.float32)
    number = np.arange(count)
    for t in np.linspace(0, 1, STEPS, dtype=np.float32):
        point = (1 - t) ** 2 * control[0] + 2 * t * (1 - t) * control[1] + t**2 * control[2]  # Bezier's curve
        near = point.round().astype(np.intp)
        for offset in np.ndindex(3, 3):
            pixel = near + np.array(offset) - 1
            distance = np.sqrt(((pixel - point) ** 2).sum(1))
            place = number, pixel[:, 0], pixel[:, 1]  # one pixel per image, so no two writes collide
            ink[place] = np.maximum(ink[place], HALF_WIDTH + 0.5 - distance)
    images: Array = (255 * ink.clip(0, 1)).round().astype(np.uint8)[:, None]
    return images
