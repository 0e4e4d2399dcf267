"""Results as text: the tables, the notes below them, the verdict of the demo, and the JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from minifisher_lab.comparison.machine import machine
from minifisher_lab.comparison.summary import REFERENCE, Spread, all_rows, reference_row, rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from optuna.trial import FrozenTrial

    from minifisher_lab.comparison.compare import Plan
    from minifisher_lab.comparison.summary import Row
    from minifisher_lab.comparison.tune import Search
    from minifisher_lab.training.runs import Run

MEANING = (
    "Best loss: lowest training loss on a fixed slice of up to 2,000 training samples, mean ± standard "
    "deviation over seeds. Seconds count training alone, without evaluation and three warm-up steps; "
    "{threads} of torch's."
)


def spread(value: Spread, digits: int = 4) -> str:
    """`mean ± deviation`: the mean has `digits` significant digits, the deviation as many decimals."""
    if math.isnan(value.mean):
        return "-"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value.mean)))) if value.mean else digits
    mean = f"{value.mean:.{decimals}f}"
    return mean if math.isnan(value.deviation) else f"{mean} ± {value.deviation:.{decimals}f}"


def number(value: float, form: str = ".1f") -> str:
    """The number, or a dash if it is nan."""
    return "-" if math.isnan(value) else f"{value:{form}}"


NAME, SHORT_NAME = 20, 8
"""The columns that a name should have, and those that it has at least; a longer one wraps."""


def table(plan: Plan, runs: Sequence[Run], width: int = 80) -> Table | Text:
    """One line per optimizer, best loss first; one block of lines per optimizer if `width` is small.

    No number is ever cut. Where a line has more than `width` columns names wrap, and what follows a mean,
    its deviation, stands below it. If that is still too wide, every number has a line of its own.
    """
    ranking = rows(runs)
    reference = reference_row(ranking)
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else f"seed {plan.seeds[0]}"
    title = f"{plan.problem.name}, {plan.budget} a run, {seeds}"
    heads = list(_columns(plan, reference))
    lines = [list(_cells(row, reference, plan.problem.classifies)) for row in ranking]
    if _width(lines) + NAME > width:
        lines = [[name, *(cell.replace(" ", "\n", 1) for cell in cells)] for name, *cells in lines]
    if _width([["optimizer", *heads], *lines]) + SHORT_NAME > width:
        return _blocks(title, heads, lines)
    result = _lined(title, heads)
    for index, line in enumerate(lines):
        result.add_row(*line, style="" if index else "bold")
    return result


def _width(lines: Sequence[Sequence[str]]) -> int:
    """The columns that all but the names take, with the gaps."""
    _, *columns = zip(*lines, strict=True)
    return sum(max(len(part) for text in column for part in text.split("\n")) + 2 for column in columns)


def _lined(title: str, heads: Sequence[str]) -> Table:
    result = Table(
        title=title,
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
        title_style="bold",
        title_justify="left",
    )
    result.add_column("optimizer", overflow="fold", min_width=SHORT_NAME)
    for name in heads:
        result.add_column(name, justify="right", no_wrap=True)
    return result


def _blocks(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Text:
    """For each optimizer its name and below it `heading: number`, one a line."""
    text = Text(overflow="fold").append(title, style="bold")
    for index, (name, *cells) in enumerate(lines):
        text.append(f"\n\n{name}", style="" if index else "bold")
        for head, cell in zip(heads, cells, strict=True):
            text.append("\n  " + " ".join(f"{head}: {cell}".split()))
    return text


def trial_table(search: Search, ranked: Sequence[FrozenTrial]) -> Table:
    """One line per trial: those that finished by their loss, then those that were cut short."""
    title = f"{search.choice.name} on {search.problem.name}, {search.budget} a trial"
    result = Table("trial", title=title, title_justify="left", title_style="bold")
    for name in ("best loss", *ranked[0].params):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("outcome")
    for trial in ranked:
        losses = [loss for loss in trial.intermediate_values.values() if math.isfinite(loss)]
        best = f"{min(losses):.5g}" if losses else "-"
        values = (f"{value:.3g}" for value in trial.params.values())
        result.add_row(str(trial.number), best, *values, _outcome(search, trial))
    return result


def _outcome(search: Search, trial: FrozenTrial) -> str:
    if trial.state.name == "COMPLETE":  # optuna gives a pruned trial a value, too
        default = all(trial.params[name] == value for name, value in search.defaults.items())
        return "the defaults" if default else "finished"
    if trial.user_attrs.get("status") == "diverged":
        return "diverged"
    measured = len(trial.intermediate_values)
    return f"cut short after {measured} of {search.points + 1} points"


def footnotes(runs: Sequence[Run]) -> str:
    """The text below the table: remarks on single optimizers, and the meaning of the columns."""
    remarks = [f"{row.optimizer}: {remark}." for row in rows(runs) if (remark := note(row))]
    return "\n".join((*remarks, MEANING.format(threads=_threads())))


def _threads() -> str:
    threads = torch.get_num_threads()
    return f"{threads} threads" if threads > 1 else "1 thread"


def _columns(plan: Plan, reference: Row | None) -> Iterable[str]:
    yield from ("lr", "best loss")
    if plan.problem.classifies:
        yield "accuracy\n%"
    yield "train\ns"
    if reference:
        yield f"s to\n{REFERENCE}'s\nbest"
    yield from ("ms a\nstep", "state\nB per\nparam")


def _cells(row: Row, reference: Row | None, classifies: bool) -> Iterable[str]:
    yield row.optimizer
    yield f"{row.rate:g}"
    yield spread(row.best_loss)
    if classifies:
        yield spread(row.accuracy, digits=3)
    yield number(row.seconds)
    if reference:
        yield seconds_to(row, reference)
    yield number(1000 * row.step_time, ".3g" if row.step_time < 0.1 else ".0f")
    yield number(row.state_per_parameter)


def seconds_to(row: Row, reference: Row) -> str:
    """The mean seconds to the reference's best loss, and how many seeds reach it."""
    seconds, reached, seeds = row.seconds_to_reference(reference)
    if not reached:
        return "never" if seeds else "-"
    return f"{seconds:.1f}" if reached == seeds else f"{seconds:.1f} ({reached}/{seeds})"


def note(row: Row) -> str:
    """What the columns do not show: divergence, interruption, skipped steps, a best rate at the edge."""
    skipped = sum(run.skipped_steps for run in row.runs)
    unfinished = sum(run.status == "interrupted" for run in row.runs)
    edge = "; a better one may lie outside" if row.at_edge else ""
    remarks = (
        (row.diverged, f"{row.diverged} of {len(row.runs)} diverged"),
        (unfinished, f"{unfinished} of {len(row.runs)} interrupted"),
        (skipped, f"{skipped} steps skipped"),
        (len(row.tried) > 1, f"lr {row.rate:g} is the best of {_listed(row.tried)}{edge}"),
    )
    return "; ".join(text for holds, text in remarks if holds)


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def verdict(challenger: str, runs: Sequence[Run]) -> str:
    """One sentence that compares the challenger with the reference, computed from the runs."""
    ranking = rows(runs)
    reference = reference_row(ranking)
    row = next((row for row in ranking if row.optimizer == challenger and row.counted), None)
    if row is None or reference is None:
        return f"Too little was measured to compare {challenger} with {REFERENCE}."
    ours, theirs = row.best_loss, reference.best_loss
    wins, seeds = wins_over(row, reference)
    gap = 100 * abs(ours.mean - theirs.mean) / theirs.mean
    side = "ahead of" if ours.mean < theirs.mean else "behind"
    relation = f"{gap:.1f} % {side}" if wins in (0, seeds) else "not clearly apart from"
    seconds, reached, _ = row.seconds_to_reference(reference)
    sentence = (
        f"{challenger.upper()} (lr {row.rate:g}) came to {spread(ours)}, {relation} {REFERENCE} at "
        f"{spread(theirs)} ({_tried(reference)}); its loss was the lower one in {wins} of {seeds} seeds"
    )
    if reached == seeds:
        sentence += (
            f", and it came to {REFERENCE}'s best loss after {seconds:.1f} of {row.seconds:.1f} seconds"
        )
    return sentence + "."


def _tried(row: Row) -> str:
    rates = len(row.tried)
    return f"lr {row.rate:g}, the best of {rates} rates" if rates > 1 else f"lr {row.rate:g}"


def wins_over(row: Row, reference: Row) -> tuple[int, int]:
    """In how many seeds the row's best loss is the lower one, and how many seeds both have."""
    targets = {run.seed: run.best_loss for run in reference.counted}
    common = [run for run in row.counted if run.seed in targets]
    return sum(run.best_loss < targets[run.seed] for run in common), len(common)


def as_json(plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """The settings, the machine, the best and all rows, and every run without its points."""
    ranking = rows(runs)
    return {
        "problem": plan.problem.name,
        "seeds": list(plan.seeds),
        "budget": asdict(plan.budget),
        **{name: getattr(plan.problem, name) for name in ("schedule", "warm_up", "initialisation")},
        "machine": machine(),
        "best": [_row_json(row, reference_row(ranking)) for row in ranking],
        "all": [_row_json(row, reference_row(ranking)) for row in all_rows(runs)],
        "runs": [
            {
                **{key: value for key, value in asdict(run).items() if key != "points"},
                "points": f"{run.name}.jsonl",
            }
            for run in runs
        ],
    }


def _row_json(row: Row, reference: Row | None) -> dict[str, Any]:
    seconds, reached, seeds = row.seconds_to_reference(reference) if reference else (math.nan, 0, 0)
    return {
        "optimizer": row.optimizer,
        "rate": row.rate,
        "tried": list(row.tried),
        "best_loss": asdict(row.best_loss),
        "test_accuracy": asdict(row.accuracy),
        "seconds": row.seconds,
        f"seconds_to_{REFERENCE}": {"mean": seconds, "reached": reached, "seeds": seeds},
        "step_seconds": row.step_time,
        "state_bytes_per_parameter": row.state_per_parameter,
        "diverged": row.diverged,
        "note": note(row),
    }
