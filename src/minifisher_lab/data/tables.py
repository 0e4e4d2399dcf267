"""Two tables that are part of scikit-learn and need no download; a fifth of the rows is the test set."""

from __future__ import annotations

import numpy as np

from minifisher_lab.data.records import Arrays

TEST = 5  # one row in so many


def breast_cancer(_arrays: Arrays, _seed: int) -> Arrays:
    """455 training and 114 test tumours: 30 measures of the cells, and whether the tumour is benign (1)."""
    from sklearn.datasets import load_breast_cancer  # slow to import, and listing the data needs none of it

    bunch = load_breast_cancer()
    return _split(bunch.data, bunch.target.astype(np.int64))


def diabetes(_arrays: Arrays, _seed: int) -> Arrays:
    """353 training and 89 test patients: 10 measures, and how far the disease went within a year.

    The target [N, 1] has mean 0 and variance 1 over the training rows.
    """
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    arrays = _split(bunch.data, bunch.target.astype(np.float32)[:, None])
    mean, deviation = arrays["train_targets"].mean(), arrays["train_targets"].std()
    scaled = {name: (arrays[name] - mean) / deviation for name in ("train_targets", "test_targets")}
    return arrays | scaled


def _split(inputs: np.ndarray, targets: np.ndarray) -> Arrays:
    """The rows in a fixed random order, because a table may be sorted."""
    order = np.random.default_rng(0).permutation(len(inputs))
    test, train = order[: len(order) // TEST + 1], order[len(order) // TEST + 1 :]
    inputs = inputs.astype(np.float32)
    return {
        "train_inputs": inputs[train],
        "train_targets": targets[train],
        "test_inputs": inputs[test],
        "test_targets": targets[test],
    }
