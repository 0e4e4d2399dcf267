"""The progress of a fetch: a callback or, by default, a bar on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Progress: TypeAlias = Callable[[str, int, "int | None"], None]
"""Called with the current step, the bytes so far, and the total bytes or None if unknown."""


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """The given callback; without one a bar on the terminal; without a terminal one line per step."""
    if progress is not None:
        yield progress
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    with RichProgress(*columns, console=console, transient=True) as bar:
        yield _reporter(bar)


def _lines(console: Console) -> Progress:
    seen: set[str] = set()

    def report(step: str, _done: int, _total: int | None) -> None:
        if step not in seen:
            seen.add(step)
            console.print(f"fetching {step}", highlight=False)

    return report


def _reporter(bar: RichProgress) -> Progress:
    def report(step: str, done: int, total: int | None) -> None:
        if not bar.tasks or bar.tasks[-1].description != step:
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(step, total=total)
        bar.update(bar.task_ids[-1], completed=done, total=total)

    return report


class Bar:
    """A progress bar with the methods that pooch calls."""

    def __init__(self, step: str, progress: Progress) -> None:
        self.step, self.progress = step, progress
        self.total = self.done = 0

    def update(self, size: int) -> None:
        """`size` more bytes have arrived."""
        self.done += size
        self.progress(self.step, self.done, self.total or None)

    def reset(self) -> None:
        """Restart at zero: at the end pooch counts all bytes once more."""
        self.done = 0

    def close(self) -> None:
        """Do nothing: `shown` closes the bar at the end of the fetch."""
