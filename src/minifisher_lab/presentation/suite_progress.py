"""The progress of a suite: the current run and the whole study, each with the time left."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from minifisher_lab.presentation.progress import MARKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import Console
    from typing_extensions import Self

    from minifisher_lab.comparison.study import Record, StudyFile, Unit
    from minifisher_lab.comparison.suite import SuitePlan
    from minifisher_lab.comparison.worker import Worker

ALL_MARKS = {**MARKS, "failed": "[red]![/]"}


class SuiteBars:
    """Two bars, and a line for every run that this process has measured."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self.one = self.progress.add_task("", total=1.0, left="", visible=False)
        self.every = self.progress.add_task(f"all {total:,} runs", total=total, completed=done, left="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def began(self, unit: Unit, setting: Mapping[str, float]) -> None:
        """Restart the bar of the run."""
        self.progress.reset(self.one, total=1.0, description=escape(title(unit)), left="", visible=True)

    def moved(self, spent: float, loss: float) -> None:
        """Advance the bar of the run."""
        elapsed = self.progress.tasks[self.one].elapsed
        left = f"{in_words(elapsed / spent * (1 - spent))} left" if elapsed and spent else ""
        self.progress.update(self.one, completed=spent, left=f"loss {loss:.4g}  {left}")

    def ended(self, record: Record, done: int, seconds_left: float) -> None:
        """Advance the bar of the study and print a line for the run."""
        self.progress.update(self.one, completed=1.0)
        self.progress.update(self.every, completed=float(done), left=f"{in_words(seconds_left)} left")
        self.progress.console.print(line(record), highlight=False)

    def waiting(self, others: Sequence[tuple[str, str, int]]) -> None:
        """Say which processes hold the remaining runs."""
        owners = sorted({f"{pid} on {host}" for _, host, pid in others})
        text = f"waiting for process {', '.join(owners)} (dead? start with --take-over)" if owners else ""
        self.progress.update(self.one, description=text or "waiting", left="", visible=True)


def introduction(study: StudyFile, plan: SuitePlan) -> str:
    """What the study measures."""
    problems = ", ".join(f"{name} ({epochs:g} epochs)" for name, epochs in plan.epochs.items())
    names = ", ".join(plan.by_name)
    return (
        f"[bold]{escape(str(study.path))}[/]: {plan.total:,} runs. Problems: {problems}. "
        f"Optimizers: {names}. {plan.trials} trials each, then {plan.seeds} seeds of the best setting."
    )


def conclusion(worker: Worker, path: Path) -> str:
    """How much is done, whether the machine was shared, and what to do next."""
    records = [record for some in worker.finished.values() for record in some.values()]
    shared = sum(record.shared for record in records)
    text = f"{len(records):,} of {worker.plan.total:,} runs are done."
    if shared:
        text += (
            f" [yellow]The machine was shared during {shared:,} of them, so their seconds are too high.[/]"
        )
    if len(records) < worker.plan.total:
        return f"{text} The same command continues."
    return f"{text} The report: minifisher report {escape(str(path))}"


def title(unit: Unit) -> str:
    """The run in words."""
    return f"{unit.problem} {unit.entrant} {unit.kind} {unit.number + 1}"


def line(record: Record) -> str:
    """The outcome of a run."""
    setting = " ".join(f"{name} {value:.3g}" for name, value in record.setting.items())
    parts = [f"{ALL_MARKS[record.status]} {escape(title(record.unit))}", setting]
    parts.append(f"loss {record.best_loss:.5g}  {record.run.seconds:.1f} s")
    if record.status != "finished":
        parts.append(escape(record.error or record.status))
    if record.shared:
        parts.append("[yellow]machine shared[/]")
    return "  ".join(parts)


def in_words(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
