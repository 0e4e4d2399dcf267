"""The report of a study: one web page that needs no other file, and Markdown with its plots beside it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from minifisher_lab.comparison import results
from minifisher_lab.comparison.results import (
    equal_time,
    interval,
    loss_within,
    reference_of,
    standings,
    time_to_target,
)
from minifisher_lab.comparison.summary import REFERENCE, Spread
from minifisher_lab.presentation import suite_plots
from minifisher_lab.presentation.report import number
from minifisher_lab.problems import PROBLEMS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from minifisher_lab.comparison.results import Axis, Findings, Result
    from minifisher_lab.comparison.study import StudyFile

LEGEND = (
    "Numbers are means over seeds with the 95 % interval of the mean (Student's t). Best loss: the lowest "
    "loss on a fixed slice of up to 2,000 training samples; settings were chosen by it. After so many "
    "seconds: the same within equal training time, the median over optimizers. Test loss and "
    "accuracy: whole test set, end of the run; with a validation set, at the best accuracy on that. To "
    "target: until a run reaches the best training loss of "
    "{reference} on the same seed; a dash if one seed never does. Seconds count training alone. Bands in "
    "plots are the range over seeds; a plot against seconds is cut where only much slower optimizers still "
    "run. Hit edge: the best value is the outermost one that was tried, so a better one may lie outside. "
    "Means leave diverged seeds out. A bold row has the fewest of them and, among those, the lowest loss."
)
PROFILE = (
    "Performance profiles (Dolan, Moré 2002): the height of a line at x is the share of problems on which "
    "the optimizer reaches {reference}'s best training loss within x times the time of the fastest optimizer."
)
STANDINGS = (
    "The table says on how many of the {count} problems an optimizer has the lowest mean training loss, or a "
    "loss whose 95 % interval meets that of the lowest, and no diverged seed. Equal time is the median over "
    "optimizers of the training time of a run, on each problem. The loss of a slower optimizer is that "
    "before its run ends."
)
SETTINGS = (
    "Every tuned optimizer had {trials} trials on each problem. Two thirds of them cover the declared "
    "ranges; each later one changes one value of the best setting: outward if it is the outermost value, "
    "otherwise towards its better neighbour. Trials have seed 0, which the runs of the results do not use."
)


@dataclass(frozen=True)
class Table:
    """A heading and rows of text; with `notes` the last column is prose."""

    head: list[str]
    rows: list[list[str]]
    notes: bool = False


def write(study: StudyFile, folder: Path) -> list[Path]:
    """Write report.html, report.md and the plots of the latter."""
    context = content(study)
    plots = {**context["profiles"]}
    for problem in context["problems"]:
        plots |= {f"{problem['name']} {name}": svg for name, svg in problem["plots"].items()}
    files = {name: f"plots/{re.sub(r'[^a-z0-9]+', '-', name.lower())}.svg" for name in plots}
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for name, svg in plots.items():
        (folder / files[name]).write_text(_on_white(svg))
    page, text = folder / "report.html", folder / "report.md"
    page.write_text(web_page(context))
    text.write_text(_rendered("report.md.j2", {**context, "files": files}))
    return [page, text]


def web_page(context: dict[str, Any]) -> str:
    """The web page that shows this content; it needs no other file."""
    return _rendered("report.html.j2", _with_theme(context))


def _rendered(template: str, context: dict[str, Any]) -> str:
    markdown = template.endswith(".md.j2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("minifisher_lab", "presentation/templates"),
        autoescape=not markdown,
        trim_blocks=markdown,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(context).strip() + "\n"


def _with_theme(context: dict[str, Any]) -> dict[str, Any]:
    """The context with plots in the page's colours."""
    problems = [{**problem, "plots": _themed(problem["plots"])} for problem in context["problems"]]
    profiles = _themed(context["profiles"])
    return {**context, "theme": suite_plots.THEME, "problems": problems, "profiles": profiles}


def _themed(plots: dict[str, str]) -> dict[str, str]:
    return {name: suite_plots.themed(svg) for name, svg in plots.items()}


def _on_white(svg: str) -> str:
    """A picture of its own: with its namespaces and a white background."""
    return re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', svg, count=1)


def content(study: StudyFile) -> dict[str, Any]:
    """Everything that the templates show."""
    findings = results.read(study)
    plan = findings.plan
    return {
        "title": f"Optimizer study {study.path.stem}",
        "introduction": _introduction(findings),
        "warnings": list(_warnings(findings)),
        "profiles": _profiles(findings),
        "profile_text": PROFILE.format(reference=REFERENCE),
        "standings": _standings(findings),
        "standings_text": STANDINGS.format(count=len(plan.epochs)),
        "problems": [_problem(findings, name) for name in plan.epochs],
        "legend": LEGEND.format(reference=REFERENCE),
        "settings_text": SETTINGS.format(trials=plan.trials),
        "machines": _machines(findings),
    }


def _introduction(findings: Findings) -> str:
    plan = findings.plan
    tuned = sum(bool(entrant.space) for entrant in plan.entrants)
    return (
        f"{len(plan.entrants)} optimizers on {len(plan.epochs)} problems. {tuned} of them were tuned with "
        f"{plan.trials} trials on each problem, the others run with fixed settings; then every optimizer ran "
        f"with {plan.seeds} seeds. All runs of a problem have the same number of epochs."
    )


def _warnings(findings: Findings) -> Iterator[str]:
    records, total = findings.records, findings.plan.total
    if len(records) < total:
        yield f"The study is not complete: {len(records):,} of {total:,} runs are done."
    shared = [record for record in records if record.shared]
    if shared:
        neighbours = sum(record.neighbours > 0 for record in shared)
        yield (
            f"The machine was shared during {len(shared):,} of {len(records):,} runs ({neighbours:,} beside "
            f"another run of the study, load average up to {max(record.load for record in shared):.1f}): "
            "their seconds are too high. Compare by epochs."
        )
    if all(reference_of(findings.of(name)) is None for name in findings.plan.epochs):
        yield f"{REFERENCE} has no result in this study, so there is no time to target and no profile."


def _profiles(findings: Findings) -> dict[str, str]:
    names, problems = list(findings.plan.by_name), len(findings.plan.epochs)
    axes: tuple[tuple[str, Axis], ...] = (("Profile by seconds", "seconds"), ("Profile by epochs", "epoch"))
    ratios = {title: results.profile(findings, axis) for title, axis in axes}
    return {title: suite_plots.profile_plot(some, names, problems) for title, some in ratios.items() if some}


def _standings(findings: Findings) -> Table:
    found = sorted(standings(findings).items(), key=lambda pair: (-pair[1][1], -pair[1][0]))
    head = ["optimizer", "first or level in equal epochs", "first or level in equal time"]
    return Table(head, [[name, str(epochs), str(time)] for name, (epochs, time) in found])


# ---- one problem ----


def _problem(findings: Findings, name: str) -> dict[str, Any]:
    problem = PROBLEMS[name]
    text = (
        f"{problem.description}; data: {problem.data}; {problem.parameters():,} parameters, batches "
        f"of {problem.batch_size}, {findings.plan.epochs[name]:g} epochs a run, learning rate: "
        f"{problem.schedule}{f', warm-up {problem.warm_up:.0%}' if problem.warm_up else ''}."
    )
    return {
        "name": name,
        "text": text,
        "plots": suite_plots.curves(
            [result.row for result in findings.of(name)], list(findings.plan.by_name)
        ),
        "table": _table(findings.of(name)),
        "trials": _trials([result for result in findings.results if result.problem == name]),
    }


def _table(found: Sequence[Result]) -> Table:
    accurate = any(run.test_accuracy is not None for result in found for run in result.row.counted)
    seconds = equal_time(found)
    head = ["optimizer", "best loss", f"after {_time(seconds)} s", "test loss"]
    head += ["accuracy, %"] if accurate else []
    head += ["to target, s", "to target, epochs", "ms a step", "state, B per parameter", "setting", "remarks"]
    return Table(head, [_row(result, reference_of(found), seconds, accurate) for result in found], notes=True)


def _row(result: Result, reference: Result | None, seconds: float, accurate: bool) -> list[str]:
    row, count = result.row, len(result.row.counted)
    test = Spread.of(run.test_loss for run in row.counted if run.test_loss is not None)
    losses = row.best_loss, loss_within(result, seconds), test
    cells = [result.entrant.name, *(with_interval(loss, count) for loss in losses)]
    if accurate:
        cells.append(with_interval(row.accuracy, count))
    axes: tuple[Axis, ...] = ("seconds", "epoch")
    cells += [_time(time_to_target(result, reference, axis)) if reference else "-" for axis in axes]
    cells += [number(1000 * row.step_time, ".3g"), number(row.state_per_parameter)]
    return [*cells, _setting(result.setting), "; ".join(_remarks(result))]


def with_interval(spread: Spread, count: int) -> str:
    """`mean ± half the interval`: two digits of the interval, four of a mean that has none."""
    half = interval(spread, count)
    if math.isnan(spread.mean):
        return "-"
    if math.isnan(half) or half == 0:
        return f"{spread.mean:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{spread.mean:.{decimals}f} ± {half:.{decimals}f}"


def _time(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _setting(setting: Any) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in setting.items())


def _remarks(result: Result) -> Iterator[str]:
    if not result.entrant.space:
        yield "not tuned"
    for name, end in result.edges.items():
        yield f"hit edge: {name} is the {end} tried"
    if result.row.diverged:
        yield f"{result.row.diverged} of {len(result.seeds)} seeds diverged"
    lost = sum(trial.status == "diverged" for trial in result.trials)
    if lost:
        yield f"{lost} of {len(result.trials)} trials diverged"
    skipped = sum(run.skipped_steps for run in result.row.runs)
    if skipped:
        yield f"{skipped} steps skipped"
    yield from (" ".join(error.split()) for error in result.errors)


def _trials(found: Sequence[Result]) -> Table:
    rows = [
        [result.entrant.name, str(trial.unit.number + 1), _setting(trial.setting), _loss(trial), trial.status]
        for result in found
        for trial in result.trials
    ]
    return Table(["optimizer", "trial", "setting", "best loss", "outcome"], rows)


def _loss(trial: Any) -> str:
    return f"{trial.best_loss:.5g}" if math.isfinite(trial.best_loss) else "-"


def _machines(findings: Findings) -> Table:
    """Every combination of machine, versions and commit that took part."""
    kinds = list({tuple(record.machine.items()): record.machine for record in findings.records}.values())
    head = ["", *(f"machine {number + 1}" for number in range(len(kinds)))]
    names = list(dict.fromkeys(name for kind in kinds for name in kind))
    return Table(head, [[name, *(str(kind.get(name, "-")) for kind in kinds)] for name in names])
