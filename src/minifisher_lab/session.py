"""One comparison from plan to files: what `compare`, `train` and `demo` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minifisher_lab import plots, processes, report
from minifisher_lab.compare import compare
from minifisher_lab.display import RunBars, Silence

if TYPE_CHECKING:
    from rich.console import Console

    from minifisher_lab.batches import Splits
    from minifisher_lab.compare import Plan
    from minifisher_lab.runs import Run, RunFolder


def run_plan(plan: Plan, splits: Splits, folder: RunFolder, console: Console) -> list[Run]:
    """Run the plan under progress bars; write results.json, print the table, draw the plots.

    Of processes that train together all run the plan, and the first alone prints and writes.
    """
    if processes.rank() > 0:
        return compare(plan, splits, folder, Silence())
    with RunBars(console, len(plan.seeds) * len(plan.candidates), "runs") as bars:
        runs = compare(plan, splits, folder, bars)
    if not any(run.points for run in runs):
        console.print("Stopped before anything was measured.")
        return runs
    results = folder.write("results.json", report.as_json(plan, runs))
    console.print()
    console.print(report.table(plan, runs))
    console.print(f"\n[dim]{report.footnotes(runs)}[/]\n", highlight=False)
    written = [results, *plots.plot(plan, runs, folder.path)]  # what can fail for looks alone comes last
    console.print(f"{folder.path}/ holds {', '.join(path.name for path in written)} and one .jsonl a run.")
    return runs
