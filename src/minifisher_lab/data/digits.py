"""Handwritten digits of 8 x 8 pixels. They are part of scikit-learn and need no download."""

from __future__ import annotations

import numpy as np

from minifisher_lab.data.records import Arrays

TEST = 360  # the last fifth: the file is not shuffled, so these have other writers


def embedded(_arrays: Arrays, _seed: int) -> Arrays:
    """1,437 training and 360 test images with values 0 to 16."""
    from sklearn.datasets import load_digits  # slow to import, and listing the data needs none of it

    bunch = load_digits()
    inputs = bunch.images.astype(np.uint8)[:, None]  # [N, 1, 8, 8]
    targets = bunch.target.astype(np.uint8)
    return {
        "train_inputs": inputs[:-TEST],
        "train_targets": targets[:-TEST],
        "test_inputs": inputs[-TEST:],
        "test_targets": targets[-TEST:],
    }
