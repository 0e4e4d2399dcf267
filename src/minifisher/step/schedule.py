"""When statistics and inverses are due: every T1 and T2 steps on average, in no period that data could have.

If statistics were due in every T1-th step exactly, batches of two kinds in turn would be seen of one kind
alone. So each window of T1 steps has one observation, at a place that moves from window to window by the
golden ratio. The places depend on the number of steps alone: they are the same in a resumed run, and on all
ranks.
"""

from __future__ import annotations

GOLDEN_RATIO = 0.6180339887498949  # minus 1: of all numbers the hardest to come near to with fractions


def next_statistics(step: int, every: int, jitter: bool, phase: float) -> int:
    """The step of the next observation after one at `step`: the one in the next window of `every` steps.

    `phase`, in [0, 1), puts the observations of different layers into different steps.
    """
    window = step // every + 1
    place = int(every * ((window * GOLDEN_RATIO + phase) % 1.0)) if jitter else 0
    return window * every + place


def next_refresh(step: int, every: int) -> int:
    """The step from which the next refresh is due after one at `step`; it follows an observation.

    In the first `every` steps the statistics change fast, so every observation is followed by a refresh, as
    in the published code.
    """
    return step + 1 if step + 1 < every else (step // every + 1) * every
