"""The command line: problems, optimizers, train, compare, tune, suite, report, inspect, data, demo."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from minifisher_lab import data, request
from minifisher_lab.comparison.candidates import candidates
from minifisher_lab.comparison.compare import Candidate, Plan
from minifisher_lab.names import listed, look_up
from minifisher_lab.presentation.session import run_plan, run_search
from minifisher_lab.problems import PROBLEMS, Problem
from minifisher_lab.training import batches, processes
from minifisher_lab.training.optimizers import choose, optimizers
from minifisher_lab.training.runs import NotWritten, Unresumable
from minifisher_lab.training.train import Budget, Trainer, warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from minifisher_lab.training.batches import Splits
    from minifisher_lab.training.optimizers import Choice

Value = TypeVar("Value")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Structured-curvature optimizers for PyTorch: try them, compare them, tune them.",
)
data_app = typer.Typer(no_args_is_help=True, help="List and download the datasets.")
app.add_typer(data_app, name="data")
console = Console()
INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended

ProblemNames = Annotated[
    list[str] | None, typer.Argument(metavar="PROBLEM...", help="One or more of `minifisher problems`.")
]
OptimizerName = Annotated[str, typer.Option(help="One of `minifisher optimizers`.")]
OptimizerNames = Annotated[str, typer.Option("--optimizers", help="Names, separated by commas.")]
Tune = Annotated[bool, typer.Option("--tune", help="Try five learning rates for each optimizer.")]
Rates = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=RATE,...", help="Learning rates of one optimizer; may be repeated."),
]
ProblemName = Annotated[str | None, typer.Argument(metavar="PROBLEM", help="One of `minifisher problems`.")]
DataName = Annotated[str, typer.Argument(metavar="NAME", help="One of `minifisher data list`.")]
Seconds = Annotated[float | None, typer.Option(help="Training seconds per run, above 0.")]
Epochs = Annotated[
    float | None, typer.Option(help="Epochs per run, above 0; default: the problem's own number.")
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN", help="Go on with the run folder RUN of a command that was stopped; needs no PROBLEM."
    ),
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(min=1, metavar="STEPS", help="Store a checkpoint every so many steps, and keep the last."),
]
Folder = Annotated[Path, typer.Option(help="Parent folder of the new run folder.")]
Device = Annotated[str | None, typer.Option(help="A torch device; default: a GPU if there is one.")]
# torch accepts 64-bit seeds. Half of that range leaves room for the offset of each torchrun process.
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the initial weights and the batches.")]
Points = Annotated[int, typer.Option(min=1, help="Logged points per run.")]


def _valid(make: Callable[[], Value]) -> Value:
    """Call `make` and turn its ValueError into an error of the command line."""
    try:
        return make()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _problem(name: str | None) -> Problem:
    if name is None:
        raise typer.BadParameter("missing argument PROBLEM: name one of `minifisher problems`")
    return _valid(lambda: look_up("problem", name, PROBLEMS))


def _splits(problem: Problem, device: str | None) -> Splits:
    place = _device(device or _default_device())
    try:
        return batches.load(problem, place)
    except data.DataMissing as error:
        console.print(f"[red]{error}[/]")
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
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


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


@app.command("problems")
def list_problems() -> None:
    """List the problems: network, batch size, default number of epochs, number of parameters."""
    table = Table(box=None, header_style="bold")
    table.add_column("problem", no_wrap=True)
    table.add_column("what it is")
    for name in ("batch", "epochs", "parameters"):
        table.add_column(name, justify="right")
    for problem in PROBLEMS.values():
        numbers = str(problem.batch_size), str(problem.epochs), f"{problem.parameters():,}"
        table.add_row(problem.name, problem.description, *numbers)
    console.print(table)


@app.command("optimizers")
def list_optimizers() -> None:
    """List the optimizers with their default learning rate and the rates that --tune tries."""
    table = Table("optimizer", "what it is", "lr", "--tune tries", box=None, header_style="bold")
    for choice in optimizers().values():
        table.add_row(
            choice.name, choice.description, f"{choice.rate:g}", f"{choice.grid[0]:g} to {choice.grid[-1]:g}"
        )
    console.print(table)
    console.print("\nArguments of a method follow its name: mbf:power=0.5:graft=None", highlight=False)


@app.command("train")
@processes.joined()
def train_command(
    context: typer.Context,
    problem: ProblemName = None,
    optimizer: OptimizerName = "mbf",
    lr: Annotated[float | None, typer.Option(help="Learning rate, if not the default.")] = None,
    seconds: Seconds = None,
    epochs: Epochs = None,
    seed: Seed = 0,
    points: Points = 50,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = None,
    folder: Folder = Path("runs"),
    device: Device = None,
) -> None:
    """Train one problem with one optimizer. Under torchrun the processes share every batch."""
    asked = request.asked(context)
    task, choice = _problem(asked.problem), _valid(lambda: choose(asked.optimizer))
    candidate = Candidate(choice, choice.rate if asked.lr is None else asked.lr)
    budget = _budget(task, asked.seconds, asked.epochs)
    plan = Plan(task, (candidate,), (asked.seed,), budget, asked.points, asked.checkpoint_every)
    _check(task, (candidate,))
    splits = _splits(task, asked.device)
    _try_out(task, splits, (candidate,))
    _describe(task, splits, candidate)
    with _clear_errors():
        run_folder = request.run_folder(context, f"{task.name}-train", **vars(asked))
        runs = run_plan(plan, splits, run_folder, console)
    _end_unless(plan.completed(runs))


def _describe(problem: Problem, splits: Splits, candidate: Candidate) -> None:
    """Print which structure a method of minifisher chooses for each weight."""
    optimizer = Trainer(problem, splits, candidate.choice, candidate.rate, seed=0).optimizer
    if hasattr(optimizer, "describe") and processes.rank() == 0:
        console.print(str(optimizer.describe()), highlight=False, markup=False, soft_wrap=True)


@app.command("compare")
@processes.joined()
def compare_command(
    context: typer.Context,
    problems: ProblemNames = None,
    optimizer_names: OptimizerNames = "adamw,sgd,mbf",
    seconds: Seconds = None,
    epochs: Epochs = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    tune: Tune = False,
    lr: Rates = None,
    points: Points = 50,
    resume: Resume = None,
    folder: Folder = Path("runs"),
    device: Device = None,
) -> None:
    """Compare optimizers in equal seconds or equal epochs: table, plots, JSON."""
    asked = request.asked(context)
    tasks = [_problem(name) for name in asked.problems]
    entrants = _valid(lambda: candidates(asked.optimizer_names, asked.tune, asked.lr or ()))
    budgets = [_budget(task, asked.seconds, asked.epochs) for task in tasks]
    for task in tasks:
        _check(task, entrants)
    loaded = [_splits(task, asked.device) for task in tasks]  # report missing data before the first run
    for task, splits in zip(tasks, loaded, strict=True):
        _try_out(task, splits, entrants)
    for task, budget, splits in zip(tasks, budgets, loaded, strict=True):
        plan = Plan(task, entrants, tuple(range(asked.seeds)), budget, asked.points)
        options = {**vars(asked), "problems": [task.name]}
        with _clear_errors():
            run_folder = request.run_folder(context, f"{task.name}-compare", **options)
            runs = run_plan(plan, splits, run_folder, console)
        _end_unless(plan.completed(runs))


@app.command("tune")
def tune_command(
    context: typer.Context,
    problem: ProblemName = None,
    optimizer: OptimizerName = "mbf",
    trials: Annotated[int, typer.Option(min=1, help="Number of settings to try.")] = 20,
    seconds: Seconds = None,
    epochs: Epochs = None,
    resume: Resume = None,
    folder: Folder = Path("runs"),
    device: Device = None,
) -> None:
    """Search one optimizer's learning rate, and damping where it has one, with optuna."""
    _needs_one_process("tune")
    from minifisher_lab.comparison.tune import Search  # optuna is slow to import and needed here alone

    asked = request.asked(context)
    task, choice = _problem(asked.problem), _valid(lambda: choose(asked.optimizer))
    search = Search(task, choice, _budget(task, asked.seconds, asked.epochs), asked.trials)
    entrants = (Candidate(choice, choice.rate),)
    _check(task, entrants)
    splits = _splits(task, asked.device)
    _try_out(task, splits, entrants)
    with _clear_errors():
        run_folder = request.run_folder(context, f"{task.name}-tune", **vars(asked))
        study = run_search(search, splits, run_folder, console)
    _end_unless(search.completed(study))


@app.command("suite")
def suite_command(
    scale: Annotated[
        Literal["small", "full"], typer.Argument(help="small fits into 1.5 hours on two cores.")
    ],
    study: Annotated[Path | None, typer.Option(help="The file; default: runs/suite-SCALE.sqlite.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Hours for the whole study: epochs are reduced to fit.")
    ] = None,
    problems: Annotated[str | None, typer.Option(help="Names, separated by commas.")] = None,
    optimizers: Annotated[str | None, typer.Option(help="Names, separated by commas.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials of every tuned optimizer.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of the best setting.")] = None,
    epochs: Epochs = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Repeat runs that other machines began: they are dead.")
    ] = False,
    device: Device = None,
) -> None:
    """Tune every optimizer on every problem and run the best settings. After a kill the command continues."""
    _needs_one_process("suite")
    from minifisher_lab.comparison.suite import make_plan, open_study  # optuna is slow to import
    from minifisher_lab.presentation.session import run_suite

    numbers = {"hours": budget, "trials": trials, "seeds": seeds, "epochs": epochs}
    plan = _valid(lambda: make_plan(scale, listed(problems), listed(optimizers), **numbers))
    for name in plan.epochs:
        _splits(_problem(name), device)  # report missing data before the first run
    place = _device(device or _default_device())
    path = study or Path("runs") / f"suite-{scale}.sqlite"
    opened, planned = _valid(lambda: open_study(path, plan, place))
    _end_unless(run_suite(opened, planned, place, console, take_over=take_over))


@app.command("inspect")
def inspect_command(
    problem: ProblemName,
    picture: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("inverse-fisher.png"),
) -> None:
    """Draw the inverse Fisher matrix of a small network, and print how much of it lies inside the blocks."""
    from minifisher_lab.comparison import fisher  # torch.func and matplotlib are slow to import
    from minifisher_lab.presentation import inspect

    task = _valid(lambda: fisher.reduced(_problem(problem)))
    found = fisher.layers(task.name)
    console.print(inspect.table(found))
    title = f"{task.name}, small network: |F⁻¹|; % of its off-diagonal norm inside the blocks"
    console.print(f"\n{inspect.draw(found, title, picture)}", highlight=False, soft_wrap=True)


@app.command("report")
def report_command(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The file that `minifisher suite` wrote.")],
    folder: Annotated[Path | None, typer.Option(help="Default: STUDY-report.")] = None,
) -> None:
    """Write a web page and Markdown about a study."""
    from minifisher_lab.comparison.study import StudyFile  # optuna is slow to import
    from minifisher_lab.presentation import suite_report

    opened = _valid(lambda: StudyFile(study))
    for path in suite_report.write(opened, folder or study.with_name(f"{study.stem}-report")):
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


@data_app.command("list")
def list_data() -> None:
    """List the datasets: what each holds, where it comes from, and whether it is on this machine."""
    table = Table(
        "dataset", "here", "what it holds", "where it comes from", "licence", box=None, header_style="bold"
    )
    for row in data.catalogue():
        table.add_row(row.name, "yes" if row.present else "", row.holds, row.source, row.licence)
    console.print(table)


@data_app.command("get")
def get_data(name: DataName) -> None:
    """Download a dataset, check it and store it."""
    _valid(lambda: look_up("dataset", name, dict.fromkeys(data.NAMES)))
    try:
        data.get(name)
    except data.DataUnavailable as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    console.print(f"{name} is ready.")


@app.command("demo")
def demo_command(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(help="Training seconds per run; there are twelve runs.")] = 4.5,
    folder: Folder = Path("runs"),
) -> None:
    """Compare MBF with its defaults and AdamW with the best of three learning rates, on 8 x 8 digits."""
    _needs_one_process("demo")
    from minifisher_lab.presentation import demo

    comparison = _valid(lambda: demo.plan(seconds))
    with _clear_errors():
        runs = demo.run(comparison, request.run_folder(context, "demo", seconds=seconds), console)
    _end_unless(comparison.completed(runs))
