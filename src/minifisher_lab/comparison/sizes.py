"""The sizes of the suites: which problems, how many epochs, trials and seeds. This is the file to change.

Every optimizer has the same sizes. A run of the search and a run of the results have the same length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minifisher_lab.problems import PROBLEMS

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Scale:
    """How much the suite measures."""

    trials: int
    """Of every optimizer that is tuned, on every problem."""
    seeds: int
    """Runs of the best setting."""
    epochs: Mapping[str, float]
    """The epochs of a run by problem; a problem without a row runs for its own number."""
    problems: tuple[str, ...]


# The problems of the small suite, one of every kind that runs offline or with small data. The minutes are for
# all methods with eight trials and three seeds, evaluation included, computed from the processor seconds of a
# step with one thread (2026-11-26, a machine of two cores). They add up to 90: with the start of every method
# and some reserve the suite fits into three hours.
SMALL_EPOCHS: dict[str, float] = {
    "autoencoder-digits": 10,  # 140 steps, 5 minutes
    "autoencoder-curves-small": 2,  # 200 steps, 12 minutes
    "cnn-digits": 20,  # 440 steps, 9 minutes
    "gcn-cora": 200,  # 200 steps, 12 minutes; minifisher data get cora
    "gpt-shakespeare-small": 0.04,  # 196 steps, 28 minutes; minifisher data get shakespeare
    "vit-digits": 10,  # 220 steps, 13 minutes
    "lstm-shakespeare": 0.04,  # 196 steps, 7 minutes
    "mlp-tabular": 20,  # 280 steps, 2 minutes
    "mlp-regression": 40,  # 440 steps, 2 minutes
}
SCALES = {
    "small": Scale(8, 3, SMALL_EPOCHS, tuple(SMALL_EPOCHS)),
    "full": Scale(12, 5, {}, tuple(PROBLEMS)),
}
