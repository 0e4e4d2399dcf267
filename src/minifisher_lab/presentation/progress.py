"""Progress bars with the loss and the remaining time, and a line for every run that has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from rich.console import Console
    from typing_extensions import Self

    from minifisher_lab.training.runs import Run

MARKS = {"finished": "[green]✓[/]", "diverged": "[red]✗[/]", "interrupted": "[yellow]■[/]"}


class PairOfBars:
    """Two bars: one for the current run, one for all runs together."""

    def __init__(self, console: Console, total: int, kind: str) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.one = self.progress.add_task("warming up", total=1.0, loss="")
        self.every = self.progress.add_task(
            f"all {total} {kind}", total=float(total), loss="", visible=total > 1
        )
        self.done = 0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def begin(self, title: str) -> None:
        """Restart the bar of the current run."""
        self.progress.reset(self.one, total=1.0, description=title, loss="")

    def advance(self, spent: float, loss: float) -> None:
        """Advance both bars."""
        self.progress.update(self.one, completed=spent, loss=f"loss {loss:.4g}")
        self.progress.update(self.every, completed=self.done + spent)

    def finish(self, line: str) -> None:
        """Complete the bar of the current run and print a line."""
        self.done += 1
        self.progress.update(self.one, completed=1.0)
        self.progress.update(self.every, completed=float(self.done))
        self.progress.console.print(line, highlight=False)


class RunBars(PairOfBars):
    """The bars of a comparison."""

    def warming(self, optimizer: str) -> None:
        """Name the optimizer that takes its warm-up steps."""
        self.progress.update(self.one, description=f"warming up {optimizer}")

    def started(self, run: Run) -> None:
        """Restart the bar for a new run."""
        self.begin(f"{run.optimizer}  lr {run.rate:g}  seed {run.seed}")

    def moved(self, run: Run, spent: float, loss: float) -> None:
        """Advance both bars."""
        self.advance(spent, loss)

    def ended(self, run: Run) -> None:
        """Print a line for the run."""
        parts = [f"{MARKS[run.status]} {run.optimizer:<13} lr {run.rate:<6g} seed {run.seed}"]
        parts.append(f"loss {run.best_loss:<7.5g}")
        if run.test_accuracy is not None:
            parts.append(f"accuracy {run.test_accuracy:.2f} %")
        parts.append(f"{run.steps:,} steps, {run.seconds:.1f} s")
        if run.status != "finished":
            parts.append(run.status)
        self.finish("  ".join(parts))


class Silence:
    """Shows nothing of a comparison: for all torchrun processes but the first."""

    def warming(self, optimizer: str) -> None:
        """Do nothing."""

    def started(self, run: Run) -> None:
        """Do nothing."""

    def moved(self, run: Run, spent: float, loss: float) -> None:
        """Do nothing."""

    def ended(self, run: Run) -> None:
        """Do nothing."""


class TrialBars(PairOfBars):
    """The bars of a search."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, total, "trials")
        self.begin("trial 0")

    def moved(self, spent: float, loss: float) -> None:
        """Advance both bars."""
        self.advance(spent, loss)

    def ended(self, trial: FrozenTrial) -> None:
        """Print a line for the trial and restart the bar for the next one."""
        settings = "  ".join(f"{name} {value:.3g}" for name, value in trial.params.items())
        status, is_complete = trial.user_attrs.get("status", ""), trial.state.name == "COMPLETE"
        outcome = f"{status} best loss {trial.value:.5g}" if is_complete else "cut short"
        self.finish(f"trial {trial.number:<3} {settings}   {outcome}")
        self.begin(f"trial {trial.number + 1}")
