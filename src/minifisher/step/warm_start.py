"""The counts of a warm start: a new average, in which all batches weigh alike."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from minifisher.step.entries import write
from minifisher.step.layer_stack import SATURATED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Entries = Iterable[dict[str, Any]]


@contextmanager
def new_average(entries: Callable[[], Entries]) -> Iterator[list[bool]]:
    """Average anew in the body, which notes of every batch whether it was averaged in.

    Afterwards the averages count as complete, and the next step recomputes the inverses. If no batch was
    averaged in, the counts are as before, and ValueError is raised.
    """
    before = [(entry, 0 + entry["observations"]) for entry in _observed(entries())]
    for entry, number in before:
        write(entry, "observations", 0 * number)  # it may be a tensor
    taken: list[bool] = []
    try:
        yield taken
    finally:
        if not any(taken):
            for entry, number in before:
                write(entry, "observations", number)
    if not any(taken):
        raise ValueError(
            "warm_start got no batch to average: the loader is empty or used up, or no gradient of its "
            "batches is finite; pass a loader that can be read from its beginning"
        )
    for entry in _observed(entries()):
        write(entry, "observations", 0 * entry["observations"] + SATURATED)
        write(entry, "missed", 1)


def _observed(entries: Entries) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry.get("observations")]
