"""The web page about a run folder of train, compare, tune or demo, in the form of a suite's report."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from minifisher_lab.comparison.summary import REFERENCE, Row, Spread, all_rows, reference_row, rows
from minifisher_lab.presentation import report, suite_plots, suite_report
from minifisher_lab.presentation.report import number
from minifisher_lab.presentation.suite_report import Table, with_interval
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training.runs import PLAN, Run
from minifisher_lab.training.train import Budget

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

LEGEND = (
    "Numbers are means over seeds with the 95 % interval of the mean (Student's t). Best loss: the lowest "
    "loss on a fixed slice of up to 2,000 training samples. Test loss and accuracy: whole test set, end of "
    "the run; with a validation set, at the best accuracy on that. Seconds count training alone. Bands in "
    "plots are the range over seeds. Means leave diverged seeds out. A bold row has the fewest of them and, "
    "among those, the lowest loss."
)
RATES = (
    "Every learning rate that was tried. The table above and the plots have the best one of each optimizer."
)
TRIALS = "Every trial, the lowest loss first. The plots have the best five. The first trial has the defaults."
DRAWN_TRIALS = 5


def write(folder: Path, into: Path) -> Path:
    """Write report.html; ValueError if the folder has no results that can be read."""
    plan = _read(folder, PLAN)
    searched = (folder / "trials.json").exists()
    context = _of_search(folder, plan) if searched else _of_comparison(folder, plan)
    into.mkdir(parents=True, exist_ok=True)
    page = into / "report.html"
    page.write_text(suite_report.web_page({**context, "title": f"{plan['command']}: {context['name']}"}))
    return page


def _read(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {name}: give a study, or the folder of a run that has ended; --resume ends it"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder / name} is damaged: {error}") from error


def _context(name: str, introduction: str, block: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """What the template shows, with one problem."""
    known = PROBLEMS.get(name)
    text = f"{known.description}; data: {known.data}." if known else "A problem of your own."
    return {
        "name": name,
        "introduction": introduction,
        "warnings": block.pop("warnings"),
        "profiles": {},
        "profile_text": "",
        "legend": LEGEND,
        "settings_text": block.pop("settings_text"),
        "problems": [{"name": name, "text": text, **block}],
        "machines": Table(["", "machine"], [[key, str(value)] for key, value in machine.items()]),
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ---- train, compare, demo ----


def _of_comparison(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    results = _read(folder, "results.json")
    runs = [_restored(folder, record) for record in results["runs"]]
    ranking, every = rows(runs), all_rows(runs)
    total = len(plan["optimizers"]) * len(results["seeds"])
    block = {
        "plots": suite_plots.curves(ranking, sorted(row.optimizer for row in ranking)),
        "table": _table(ranking, reference_row(ranking)),
        "trials": _table(every, reference_row(ranking)),
        "settings_text": RATES if len(every) > len(ranking) else "",
        "warnings": list(_warnings(runs, total)),
    }
    introduction = (
        f"{_count(len(ranking), 'optimizer')}, {_count(len(results['seeds']), 'seed')}, "
        f"{Budget(**results['budget'])} a run; begun {plan['started']}."
    )
    return _context(results["problem"], introduction, block, results["machine"])


def _restored(folder: Path, record: dict[str, Any]) -> Run:
    run = Run(*(record[name] for name in ("problem", "optimizer", "rate", "seed")))
    run.restore({**record, "points": _points(folder, record["points"])})
    return run


def _points(folder: Path, name: str) -> list[dict[str, Any]]:
    """The logged points of a run; none if its file was deleted."""
    path = folder / name
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it, and the page has no curve of it") from error


def _warnings(runs: Sequence[Run], total: int) -> Iterator[str]:
    interrupted = sum(run.status == "interrupted" for run in runs)
    if interrupted or len(runs) < total:
        yield f"Interrupted: {len(runs) - interrupted} of at least {total} runs came to their end."


def _table(ranking: Sequence[Row], reference: Row | None) -> Table:
    accurate = any(run.test_accuracy is not None for row in ranking for run in row.counted)
    head = ["optimizer", "lr", "best loss", "test loss", *(["accuracy, %"] if accurate else []), "training s"]
    head += [f"s to {REFERENCE}'s best", "ms a step", "state, B per parameter", "remarks"]
    return Table(head, [_cells(row, reference, accurate) for row in ranking], notes=True)


def _cells(row: Row, reference: Row | None, accurate: bool) -> list[str]:
    count = len(row.counted)
    test = Spread.of(run.test_loss for run in row.counted if run.test_loss is not None)
    cells = [row.optimizer, f"{row.rate:g}", with_interval(row.best_loss, count), with_interval(test, count)]
    if accurate:
        cells.append(with_interval(row.accuracy, count))
    cells += [number(row.seconds), report.seconds_to(row, reference) if reference else "-"]
    return [*cells, number(1000 * row.step_time, ".3g"), number(row.state_per_parameter), report.note(row)]


# ---- tune ----


def _of_search(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    results = _read(folder, "trials.json")
    trials = sorted(results["trials"], key=_loss)
    best = [trial for trial in trials if trial["state"] == "complete"][:DRAWN_TRIALS]
    drawn = [Row(f"trial {t['number']}", t["lr"], (_run_of(folder, results, t),), (t["lr"],)) for t in best]
    arguments = [key for key in (trials[0] if trials else {}) if key not in _OF_EVERY_TRIAL]
    head = ["trial", *arguments, "best loss", "outcome"]
    table = Table(head, [_trial(trial, arguments) for trial in trials], notes=True)
    block = {
        "plots": suite_plots.curves(drawn, [row.optimizer for row in drawn]),
        "table": Table(head, table.rows[:DRAWN_TRIALS], notes=True),
        "trials": table,
        "settings_text": TRIALS,
        "warnings": [],
    }
    searched = f"{_count(len(trials), 'trial')} of {results['optimizer']}"
    introduction = f"{searched}, {results['budget']} each; begun {plan['started']}."
    machine = {name: plan[name] for name in ("device", "torch")}
    return _context(results["problem"], introduction, block, machine)


_OF_EVERY_TRIAL = ("number", "state", "status", "best_loss", "losses")


def _loss(trial: dict[str, Any]) -> tuple[bool, float]:
    """Those that came to their end first."""
    loss = trial["best_loss"]
    return trial["state"] != "complete", math.inf if loss is None else loss


def _run_of(folder: Path, results: dict[str, Any], trial: dict[str, Any]) -> Run:
    run = Run(
        results["problem"], f"trial{trial['number']}-{results['optimizer']}", trial["lr"], 0, "finished"
    )
    record = {"problem": run.problem, "optimizer": run.optimizer, "rate": run.rate, "seed": run.seed}
    run.restore({**record, "points": _points(folder, f"{run.name}.jsonl")})
    return run


def _trial(trial: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    loss = "-" if trial["best_loss"] is None else f"{trial['best_loss']:.5g}"
    outcome = {"complete": "finished", "pruned": "cut short"}.get(trial["state"], trial["state"])
    if trial["status"] == "diverged":
        outcome = "diverged"
    values = [f"{trial[argument]:.3g}" for argument in arguments]
    return [str(trial["number"]), *values, loss, outcome]
