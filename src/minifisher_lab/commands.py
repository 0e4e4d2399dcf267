"""What the commands do once the command line has been read. This module imports torch; cli.py does not."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import typer

from minifisher_lab import data, request
from minifisher_lab.comparison import machine
from minifisher_lab.comparison.candidates import candidates
from minifisher_lab.comparison.compare import Candidate, Plan
from minifisher_lab.presentation import report
from minifisher_lab.presentation.session import run_plan, run_search
from minifisher_lab.problems import Problem, find
from minifisher_lab.terminal import beside_json, console, print_json
from minifisher_lab.training import batches, processes
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import NotWritten, Unresumable, reason, without_infinities
from minifisher_lab.training.train import Budget, Trainer, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import SimpleNamespace

    from rich.console import Console

    from minifisher_lab.training.batches import Splits
    from minifisher_lab.training.optimizers import Choice

Value = TypeVar("Value")
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


def _valid(make: Callable[[], Value]) -> Value:
    """Call `make` and turn its ValueError into an error of the command line."""
    try:
        return make()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _problem(name: str | None) -> Problem:
    if name is None:
        raise typer.BadParameter("missing argument PROBLEM: name one of `minifisher problems`")
    return _valid(lambda: find(name))


CHANGES = ("schedule", "warm_up", "initialisation")
"""Options that replace a field of the problem."""


def _asked_problem(name: str | None, asked: SimpleNamespace) -> Problem:
    """The problem with the changes that the command line asks for; older run folders have no such options."""
    given = {field: value for field in CHANGES if (value := getattr(asked, field, None)) is not None}
    return replace(_problem(name), **given)


def _splits(problem: Problem, device: str | None) -> Splits:
    place = _device(device or _default_device())
    try:
        return _valid(lambda: batches.load(problem, place))
    except data.DataMissing as error:
        _print_error(error)
        raise typer.Exit(1) from error


def _device(name: str) -> torch.device:
    """The device, tested by one computation. torch's exception depends on what is wrong with the device."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError) as error:
        reason, default = shorten(str(error), 100), _default_device()
        message = f"torch cannot compute on {name!r} ({reason}): omit --device to use {default}"
        raise typer.BadParameter(message) from error
    return device


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn a run folder that cannot go on, and results that cannot be written, into one clear error."""
    try:
        yield
    except Unresumable as error:
        raise typer.BadParameter(str(error)) from error
    except NotWritten as error:
        _print_error(error)
        raise typer.Exit(1) from error


def _print_error(error: Exception | str) -> None:
    """Print it to the standard error, so that the standard output holds results alone."""
    show = beside_json(as_json=True)
    show.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)


def _check(problem: Problem, candidates: Iterable[Candidate]) -> None:
    """Build every optimizer once, so that a wrong argument is reported before the first run."""
    _valid(lambda: processes.check_shares(problem.batch_size))
    for choice, rate in candidates:
        with _blamed_on_arguments(problem, choice):
            choice.build(problem.build(seed=0), lr=rate)


def _try_out(problem: Problem, splits: Splits, candidates: Iterable[Candidate]) -> None:
    """Take a step with every optimizer that has arguments: some are found wrong only then."""
    for choice in {candidate.choice.name: candidate.choice for candidate in candidates}.values():
        if ":" in choice.name:
            with _blamed_on_arguments(problem, choice):
                warm_up(problem, splits, choice, steps=1)


@contextmanager
def _blamed_on_arguments(problem: Problem, choice: Choice) -> Iterator[None]:
    """Turn whatever an optimizer raises into an error of the command line that names its arguments."""
    try:
        yield
    except Exception as error:  # torch unpacks, compares and indexes what it is given
        kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
        raise typer.BadParameter(f"{choice.name} on {problem.name}: {kind}{error}") from error


def _needs_one_process(command: str) -> None:
    if processes.started() > 1:
        raise typer.BadParameter(f"{command} runs in one process: start it without torchrun")


def _budget(problem: Problem, seconds: float | None, epochs: float | None) -> Budget:
    neither = seconds is None and epochs is None
    return _valid(lambda: Budget(seconds, problem.epochs if neither else epochs))


def _end_unless(completed: bool) -> None:
    """Exit with the status of Ctrl-C if Ctrl-C stopped the work; call this after the results are saved."""
    if not completed:
        raise typer.Exit(INTERRUPTED)


def _default_device() -> str:
    return "cuda" if processes.enough_gpus() else "cpu"


def _prepare(asked: SimpleNamespace, show: Console) -> None:
    """Set the number of threads, and warn where seconds would mislead."""
    threads = getattr(asked, "threads", None)  # older run folders have none
    if threads is not None:
        torch.set_num_threads(threads)
    if processes.rank() == 0:
        for warning in machine.warnings():
            show.print(f"Warning: {warning}", style="yellow", highlight=False)


@processes.joined()
def train(context: typer.Context) -> None:
    """Train one problem with one optimizer."""
    asked, show = request.asked(context), beside_json(context.params["as_json"])
    _prepare(asked, show)
    task, choice = _asked_problem(asked.problem, asked), _valid(lambda: choose(asked.optimizer))
    candidate = Candidate(choice, choice.rate if asked.lr is None else asked.lr)
    budget = _budget(task, asked.seconds, asked.epochs)
    plan = Plan(task, (candidate,), (asked.seed,), budget, asked.points, asked.checkpoint_every)
    _check(task, (candidate,))
    splits = _splits(task, asked.device)
    _try_out(task, splits, (candidate,))
    _describe(task, splits, candidate, show)
    with _documents(context, several=False) as documents:
        documents.append(_carried_out(context, plan, splits, f"{task.name}-train", vars(asked)))


def _describe(problem: Problem, splits: Splits, candidate: Candidate, show: Console) -> None:
    """Print which structure a method of minifisher chooses for each weight."""
    optimizer = Trainer(problem, splits, candidate.choice, candidate.rate, seed=0).optimizer
    if hasattr(optimizer, "describe") and processes.rank() == 0:
        show.print(str(optimizer.describe()), highlight=False, markup=False, soft_wrap=True)


@processes.joined()
def compare(context: typer.Context) -> None:
    """Compare optimizers on one problem after the other."""
    asked, show = request.asked(context), beside_json(context.params["as_json"])
    _prepare(asked, show)
    tasks = {name: _asked_problem(name, asked) for name in asked.problems}
    entrants = _valid(lambda: candidates(asked.optimizer_names, asked.tune, asked.lr or ()))
    budgets = [_budget(task, asked.seconds, asked.epochs) for task in tasks.values()]
    for task in tasks.values():
        _check(task, entrants)
    loaded = [
        _splits(task, asked.device) for task in tasks.values()
    ]  # report missing data before the first run
    for task, splits in zip(tasks.values(), loaded, strict=True):
        _try_out(task, splits, entrants)
    with _documents(context, several=len(tasks) > 1) as documents:
        for (name, task), budget, splits in zip(tasks.items(), budgets, loaded, strict=True):
            plan = Plan(task, entrants, tuple(range(asked.seeds)), budget, asked.points, follow=asked.tune)
            options = {**vars(asked), "problems": [name]}
            documents.append(_carried_out(context, plan, splits, f"{task.name}-compare", options))
            if not documents[-1].completed:
                break


class _Document(NamedTuple):
    """The result of one problem, and whether all its runs came to their end."""

    content: dict[str, Any]
    completed: bool


@contextmanager
def _documents(context: typer.Context, *, several: bool) -> Iterator[list[_Document]]:
    """Collect results. At the end --json prints them, after an error too: as a list if `several`."""
    documents: list[_Document] = []
    try:
        yield documents
    finally:
        if context.params["as_json"] and processes.rank() == 0 and documents:
            contents = [document.content for document in documents]
            print_json(without_infinities(contents if several else contents[0]))
    _end_unless(all(document.completed for document in documents))


def _carried_out(
    context: typer.Context, plan: Plan, splits: Splits, label: str, options: dict[str, object]
) -> _Document:
    with _clear_errors():
        folder = request.run_folder(context, label, **options)
        runs = run_plan(plan, splits, folder, beside_json(context.params["as_json"]))
    return _Document({**report.as_json(plan, runs), "folder": str(folder.path)}, plan.completed(runs))


def tune(context: typer.Context) -> None:
    """Search the settings of one optimizer."""
    _needs_one_process("tune")
    from minifisher_lab.comparison.tune import Search, as_json  # optuna is slow to import

    asked, show = request.asked(context), beside_json(context.params["as_json"])
    _prepare(asked, show)
    task, choice = _asked_problem(asked.problem, asked), _valid(lambda: choose(asked.optimizer))
    search = Search(task, choice, _budget(task, asked.seconds, asked.epochs), asked.trials)
    entrants = (Candidate(choice, choice.rate),)
    _check(task, entrants)
    splits = _splits(task, asked.device)
    _try_out(task, splits, entrants)
    with _clear_errors():
        run_folder = request.run_folder(context, f"{task.name}-tune", **vars(asked))
        study = run_search(search, splits, run_folder, show)
    if context.params["as_json"]:
        print_json(without_infinities({**as_json(search, study), "folder": str(run_folder.path)}))
    _end_unless(search.completed(study))


def suite(
    scale: str, study: Path | None, names: tuple[list[str] | None, list[str] | None],
    numbers: dict[str, Any], device: str | None, *, take_over: bool,
) -> None:  # fmt: skip
    """Tune every optimizer on every problem and run the best settings."""
    _needs_one_process("suite")
    from minifisher_lab.comparison.study import FILE_ERRORS  # optuna is slow to import
    from minifisher_lab.comparison.suite import make_plan, open_study
    from minifisher_lab.presentation.session import run_suite

    plan = _valid(lambda: make_plan(scale, *names, **numbers))
    for name in plan.epochs:
        _splits(_problem(name), device)  # report missing data before the first run
    place = _device(device or _default_device())
    path = study or Path("runs") / f"suite-{scale}.sqlite"
    opened, planned = _valid(lambda: open_study(path, plan, place))
    try:
        completed = _valid(lambda: run_suite(opened, planned, place, console, take_over=take_over))
    except FILE_ERRORS as error:  # the disk is full, or the file is read-only
        _print_error(
            f"cannot write {path} ({reason(error)}). After that is mended, the same command continues"
        )
        raise typer.Exit(1) from error
    _end_unless(completed)


@contextmanager
def _place_named(option: str) -> Iterator[None]:
    """Turn a place that cannot be written into an error of the command line that names the option."""
    try:
        yield
    except OSError as error:
        message = f"cannot write {error.filename} ({error.strerror}): name another place with {option}"
        raise typer.BadParameter(message) from error


def _check_place(folder: Path, *, make: bool = False) -> None:
    """OSError if no file can be made in the folder; this is known before a long computation."""
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(folder)) from error


def inspect(problem: str | None, picture: Path) -> None:
    """Draw the inverse Fisher matrix of a small network."""
    from matplotlib.backend_bases import FigureCanvasBase

    from minifisher_lab.comparison import fisher  # torch.func and matplotlib are slow to import
    from minifisher_lab.presentation import inspect as drawing

    task = _valid(lambda: fisher.reduced(_problem(problem)))
    with _place_named("--picture"):
        _check_place(picture.parent)
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if picture.suffix and picture.suffix[1:].lower() not in kinds:
        raise typer.BadParameter(f"--picture {picture} must end in one of {', '.join(kinds)}")
    found = fisher.layers(task.name)
    console.print(drawing.table(found))
    title = f"{task.name}, small network: |F⁻¹|; % of its off-diagonal norm inside the blocks"
    with _place_named("--picture"):
        drawn = drawing.draw(found, title, picture)
    console.print(f"\n{drawn}", highlight=False, markup=False, soft_wrap=True)


def write_report(study: Path, folder: Path | None) -> None:
    """Write a web page about a run folder, or a web page and Markdown about a study."""
    if study.is_dir():
        from minifisher_lab.presentation import run_report

        place = folder or study
        with _place_named("--folder"):
            _check_place(place, make=True)
            written = [_valid(lambda: run_report.write(study, place))]
    else:
        from minifisher_lab.comparison.study import StudyFile  # optuna is slow to import
        from minifisher_lab.presentation import suite_report

        opened = _valid(lambda: StudyFile(study))
        place = folder or study.with_name(f"{study.stem}-report")
        with _place_named("--folder"):
            _check_place(place, make=True)
            written = _valid(lambda: suite_report.write(opened, place))
    for path in written:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def demonstrate(context: typer.Context, seconds: float) -> None:
    """Compare MBF with its defaults and a tuned AdamW."""
    _needs_one_process("demo")
    from minifisher_lab.presentation import demo

    comparison = _valid(lambda: demo.plan(seconds))
    with _clear_errors():
        runs = demo.run(comparison, request.run_folder(context, "demo", seconds=seconds), console)
    _end_unless(comparison.completed(runs))
