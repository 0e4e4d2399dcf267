"""The command line: problems, optimizers, train, compare, tune, suite, report, inspect, data, demo.

It declares commands and options. What a command does is in commands.py, which is imported when one runs:
torch and matplotlib take seconds to import, and the help and the lists do not need them.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from minifisher_lab.names import listed
from minifisher_lab.terminal import console as console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Structured-curvature optimizers for PyTorch: try them, compare them, tune them.",
)
data_app = typer.Typer(no_args_is_help=True, help="List and download the datasets.")
app.add_typer(data_app, name="data")


def _complete_problems(incomplete: str) -> list[str]:
    from minifisher_lab.presentation import lists

    return [name for name in lists.names("problem") if name.startswith(incomplete)]


def _complete_optimizers(incomplete: str) -> list[str]:
    """The last of the names that are separated by commas."""
    from minifisher_lab.presentation import lists

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in lists.names("optimizer") if name.startswith(last)]


def _complete_data(incomplete: str) -> list[str]:
    from minifisher_lab import data

    return [name for name in data.NAMES if name.startswith(incomplete)]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"minifisher {metadata.version('minifisher')}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that come before the command."""


ProblemNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROBLEM...",
        help="One or more of `minifisher problems`, or MODULE:FUNCTION for a problem of your own.",
        autocompletion=_complete_problems,
    ),
]
OptimizerName = Annotated[
    str, typer.Option(help="One of `minifisher optimizers`.", autocompletion=_complete_optimizers)
]
OptimizerNames = Annotated[
    str,
    typer.Option("--optimizers", help="Names, separated by commas.", autocompletion=_complete_optimizers),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Try five learning rates for each optimizer, and more where the best is the lowest or highest.",
    ),
]
Rates = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=RATE,...", help="Learning rates of one optimizer; may be repeated."),
]
ProblemName = Annotated[
    str | None,
    typer.Argument(
        metavar="PROBLEM",
        help="One of `minifisher problems`, or MODULE:FUNCTION for a problem of your own.",
        autocompletion=_complete_problems,
    ),
]
DataName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="One of `minifisher data list`.", autocompletion=_complete_data),
]
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
Schedule = Annotated[
    Literal["constant", "linear", "cosine", "steps", "thirds"] | None,
    typer.Option(
        help="How the learning rate falls: steps is x 0.1 at 30, 60 and 90 % of a run, thirds at each third; "
        "default: the problem's own."
    ),
]
WarmUp = Annotated[
    float | None,
    typer.Option(
        min=0, max=0.9, metavar="SHARE", help="The share of a run in which the learning rate rises linearly."
    ),
]
Initialisation = Annotated[
    Literal["torch", "fan-out"] | None,
    typer.Option(help="fan-out: convolutions start from N(0, 2 / (k² out)) and bias 0."),
]
Folder = Annotated[Path, typer.Option(help="Parent folder of the new run folder.")]
Device = Annotated[str | None, typer.Option(help="A torch device; default: a GPU if there is one.")]
# torch accepts 64-bit seeds. Half of that range leaves room for the offset of each torchrun process.
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the initial weights and the batches.")]
Points = Annotated[int, typer.Option(min=1, help="Logged points per run.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads that torch computes with; default: torch's own number.")
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as JSON, a list if there are several; all else goes to the standard error.",
    ),
]


@app.command("problems")
def list_problems(as_json: AsJson = False) -> None:
    """List the problems: network, data, batch size, default number of epochs, number of parameters."""
    from minifisher_lab.presentation import lists

    lists.problems(as_json)


@app.command("optimizers")
def list_optimizers(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="One of them: list its arguments.", autocompletion=_complete_optimizers
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the optimizers with their learning rates, or the arguments of one of them."""
    from minifisher_lab.presentation import lists

    lists.optimizer(name, as_json) if name else lists.all_optimizers(as_json)


@app.command("train")
def train_command(
    context: typer.Context,
    problem: ProblemName = None,
    optimizer: OptimizerName = "mbf",
    lr: Annotated[float | None, typer.Option(help="Learning rate, if not the default.")] = None,
    seconds: Seconds = None,
    epochs: Epochs = None,
    schedule: Schedule = None,
    warm_up: WarmUp = None,
    initialisation: Initialisation = None,
    seed: Seed = 0,
    points: Points = 50,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = None,
    folder: Folder = Path("runs"),
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Train one problem with one optimizer. Under torchrun the processes share every batch."""
    from minifisher_lab import commands

    commands.train(context)


@app.command("compare")
def compare_command(
    context: typer.Context,
    problems: ProblemNames = None,
    optimizer_names: OptimizerNames = "adamw,sgd,mbf",
    seconds: Seconds = None,
    epochs: Epochs = None,
    schedule: Schedule = None,
    warm_up: WarmUp = None,
    initialisation: Initialisation = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    tune: Tune = False,
    lr: Rates = None,
    points: Points = 50,
    resume: Resume = None,
    folder: Folder = Path("runs"),
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compare optimizers in equal seconds or equal epochs: table, plots, JSON."""
    from minifisher_lab import commands

    commands.compare(context)


@app.command("tune")
def tune_command(
    context: typer.Context,
    problem: ProblemName = None,
    optimizer: OptimizerName = "mbf",
    trials: Annotated[int, typer.Option(min=1, help="Number of settings to try.")] = 20,
    seconds: Seconds = None,
    epochs: Epochs = None,
    schedule: Schedule = None,
    warm_up: WarmUp = None,
    initialisation: Initialisation = None,
    resume: Resume = None,
    folder: Folder = Path("runs"),
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Search one optimizer's learning rate, and damping where it has one, with optuna."""
    from minifisher_lab import commands

    commands.tune(context)


@app.command("suite")
def suite_command(
    scale: Annotated[
        Literal["small", "full"],
        typer.Argument(help="small fits into 3 hours on two cores; the sizes: comparison/sizes.py."),
    ],
    study: Annotated[Path | None, typer.Option(help="The file; default: runs/suite-SCALE.sqlite.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Hours for the whole study, above 0: trials and epochs are reduced to fit, for all alike."
        ),
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
    from minifisher_lab import commands

    numbers = {"hours": budget, "trials": trials, "seeds": seeds, "epochs": epochs}
    names = listed(problems), listed(optimizers)
    commands.suite(scale, study, names, numbers, device, take_over=take_over)


@app.command("inspect")
def inspect_command(
    problem: ProblemName,
    picture: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("inverse-fisher.png"),
) -> None:
    """Draw the inverse Fisher matrix of a small network, and print how much of it lies inside the blocks."""
    from minifisher_lab import commands

    commands.inspect(problem, picture)


@app.command("report")
def report_command(
    study: Annotated[
        Path,
        typer.Argument(metavar="STUDY", help="The file that `minifisher suite` wrote, or any run folder."),
    ],
    folder: Annotated[
        Path | None, typer.Option(help="Default: STUDY-report, or the run folder itself.")
    ] = None,
) -> None:
    """Write a web page about a run folder, or a web page and Markdown about a study."""
    from minifisher_lab import commands

    commands.write_report(study, folder)


@data_app.command("list")
def list_data(as_json: AsJson = False) -> None:
    """List the datasets: what each holds, where it comes from, and whether it is on this machine."""
    from minifisher_lab.presentation import lists

    lists.datasets(as_json)


@data_app.command("get")
def get_data(name: DataName) -> None:
    """Download a dataset, check it and store it."""
    from minifisher_lab.presentation import lists

    lists.fetch(name)


@app.command("demo")
def demo_command(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(help="Training seconds per run; there are twelve runs.")] = 4.5,
    folder: Folder = Path("runs"),
) -> None:
    """Compare MBF with its defaults and AdamW with the best of three learning rates, on 8 x 8 digits."""
    from minifisher_lab import commands

    commands.demonstrate(context, seconds)
