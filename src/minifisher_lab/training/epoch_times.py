"""What an epoch took on this machine: a file in the cache of the datasets, for `minifisher problems`."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

from minifisher_lab import files
from minifisher_lab.data import store

if TYPE_CHECKING:
    from pathlib import Path

    from minifisher_lab.training.runs import Run

LEAST_STEPS = 20
"""Fewer are not timed: the first ones compile and allocate."""
PREFERRED = "adamw"
"""The optimizer whose time is shown if it was measured."""


def path() -> Path:
    """The file: the seconds of an epoch by problem and optimizer."""
    return store.folder() / "epoch-times.json"


def known() -> dict[str, dict[str, float]]:
    """All that was measured; nothing if the file cannot be read."""
    with suppress(OSError, ValueError):
        content: dict[str, dict[str, float]] = json.loads(path().read_text())
        return content
    return {}


def keep(run: Run, steps_per_epoch: int) -> None:
    """Remember the time of a run; the last one counts. A time that cannot be stored must not end the run."""
    if run.steps < LEAST_STEPS:
        return
    times = known()
    seconds = float(f"{run.seconds / run.steps * steps_per_epoch:.3g}")
    times.setdefault(run.problem, {})[run.optimizer] = seconds
    with suppress(OSError):
        path().parent.mkdir(parents=True, exist_ok=True)
        files.write(path(), json.dumps(times, indent=1).encode())


def shown(times: dict[str, float]) -> tuple[str, float] | None:
    """The optimizer and the seconds that a list shows: AdamW's, else the first one measured."""
    if not times:
        return None
    name = PREFERRED if PREFERRED in times else next(iter(times))
    return name, times[name]
