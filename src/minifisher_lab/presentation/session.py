"""Run a comparison or a search under progress bars, then print its results and write them to files."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.markup import escape

from minifisher_lab.comparison.compare import compare
from minifisher_lab.presentation import report
from minifisher_lab.presentation.progress import RunBars, Silence, TrialBars
from minifisher_lab.training import processes
from minifisher_lab.training.runs import NotWritten, remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna
    import torch
    from rich.console import Console

    from minifisher_lab.comparison.compare import Plan
    from minifisher_lab.comparison.study import StudyFile
    from minifisher_lab.comparison.suite import SuitePlan
    from minifisher_lab.comparison.tune import Search
    from minifisher_lab.training.batches import Splits
    from minifisher_lab.training.runs import Run, RunFolder


def run_plan(plan: Plan, splits: Splits, folder: RunFolder, console: Console) -> list[Run]:
    """Run the plan under progress bars, write results.json, print the table and draw the plots.

    Under torchrun every process runs the plan, but only the first prints and writes.
    """
    if processes.rank() > 0:
        return compare(plan, splits, folder, Silence())
    with RunBars(console, len(plan.seeds) * len(plan.candidates), "runs") as bars:
        runs = compare(plan, splits, folder, bars)
    if not any(run.points for run in runs):
        console.print("Stopped before anything was measured.")
        return runs
    from minifisher_lab.presentation import plots  # matplotlib is slow to import

    console.print()
    console.print(report.table(plan, runs, console.width))
    console.print(f"\n[dim]{escape(report.footnotes(runs))}[/]\n", highlight=False)
    with _advice(folder):
        results = folder.keep("results.json", report.as_json(plan, runs))
        folder.write_again()
        written = [results, *plots.plot(plan, runs, folder.path)]  # plots last: a failure loses no results
    names = ", ".join(path.name for path in written)
    console.print(f"{folder.path}/ holds {names} and one .jsonl a run.", markup=False)
    return runs


@contextmanager
def _advice(folder: RunFolder) -> Iterator[None]:
    """Say what to do if the results cannot be written."""
    try:
        yield
    except OSError as error:
        own = isinstance(error, NotWritten)
        trouble = str(error) if own else f"cannot write into {folder.path}: {error.strerror}"
        raise NotWritten(
            f"{trouble}. The table above holds what was measured. {remedy(trouble)}, then start it "
            f"again with --resume {folder.path}: only what could not be stored is measured again"
        ) from error


def run_search(search: Search, splits: Splits, folder: RunFolder, console: Console) -> optuna.Study:
    """Run the search under progress bars, then print its best settings and where all trials are."""
    from minifisher_lab.comparison.tune import TRIALS, as_json  # optuna is slow to import

    with TrialBars(console, search.trials) as bars:
        study = search.run(splits, folder, bars.ended, bars.moved)
    _show_best(search, study, console)
    with _advice(folder):
        trials = folder.keep(TRIALS, as_json(search, study))
        folder.write_again()
    console.print(f"All trials: {trials}", highlight=False, markup=False)
    return study


def _show_best(search: Search, study: optuna.Study, console: Console) -> None:
    best = search.finished(study)
    if not best:
        console.print("No trial ran to its end.")
        return
    console.print(report.trial_table(search, search.ranked(study)))
    arguments = ", ".join(f"{name}={value:.3g}" for name, value in best[0].params.items())
    console.print(f"Best: {search.choice.name} with {arguments}.", highlight=False, markup=False)


def run_suite(
    study: StudyFile, plan: SuitePlan, device: torch.device, console: Console, *, take_over: bool
) -> bool:
    """Measure what is left of a study, and say whether that was completed; Ctrl-C stops it."""
    from minifisher_lab.comparison.worker import Worker  # optuna is slow to import
    from minifisher_lab.presentation import suite_progress

    console.print(suite_progress.introduction(study, plan), highlight=False)
    worker = Worker(study, plan, device, take_over=take_over)
    with suite_progress.SuiteBars(console, plan.total, worker.done()) as bars, suppress(KeyboardInterrupt):
        worker.work(bars)
    done = worker.done()
    console.print(suite_progress.conclusion(worker, study.path), highlight=False)
    return done == plan.total
