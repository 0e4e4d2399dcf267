from __future__ import annotations

import builtins
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import minifisher
from minifisher_lab import __main__, cli
from minifisher_lab.comparison import candidates, machine
from minifisher_lab.comparison.compare import Candidate, Plan
from minifisher_lab.comparison.tune import Search
from minifisher_lab.presentation import demo, report
from minifisher_lab.problems import FAMILIES, PROBLEMS, Problem
from minifisher_lab.training import batches, epoch_times
from minifisher_lab.training import train as train_module
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Point, Run, RunFolder
from minifisher_lab.training.train import Budget

WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


def _invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=WIDE)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "width", 200)


def _only_folder(parent: Path) -> Path:
    (folder,) = parent.iterdir()
    return folder


def test_problems_and_optimizers_list_every_name() -> None:
    for command, names in (("problems", PROBLEMS), ("optimizers", ["adamw", "muon", *minifisher.METHODS])):
        code, output = _invoke(command)
        assert code == 0
        assert all(name in output for name in names)


def test_train_writes_a_run_folder(tmp_path: Path) -> None:
    code, output = _invoke(
        *(
            "train",
            "autoencoder-digits",
            "--optimizer",
            "sgd",
            "--lr",
            1e-2,
            "--epochs",
            1,
            "--folder",
            tmp_path,
        )
    )
    assert code == 0, output
    assert len((_only_folder(tmp_path) / "sgd-lr0.01-seed0.jsonl").read_text().splitlines()) == 15
    assert "Best loss" in output


def test_compare_takes_problems_rates_and_seeds(tmp_path: Path) -> None:
    code, output = _invoke(
        *("compare", "autoencoder-digits", "cnn-digits", "--optimizers", "adamw,sgd", "--epochs", 0.3),
        *("--seeds", 2, "--lr", "adamw=1e-3,3e-3", "--points", 2, "--folder", tmp_path),
    )
    assert code == 0, output
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    assert all(len(list(folder.glob("*.jsonl"))) == 6 for folder in folders)
    assert "adamw: lr" in output


OWN = Path(__file__).parents[2] / "examples" / "own_problem.py"


def test_a_problem_of_ones_own_is_compared_and_resumed(tmp_path: Path) -> None:
    short = ("--epochs", 1, "--points", 2, "--optimizers", "adamw,mbf")
    code, output = _invoke("compare", f"{OWN}:make_problem", *short, "--folder", tmp_path)
    assert code == 0, output
    assert "halves, 1 epochs a run" in output
    code, output = _invoke("compare", "--resume", _only_folder(tmp_path))
    assert code == 0, output


def test_own_targets_may_be_numbers() -> None:
    x = torch.randn(6, 3)
    problem = Problem("line", lambda: (x, x[:, :1], x, x[:, :1]), lambda: torch.nn.Linear(3, 1), "gaussian")
    splits = batches.load(problem, torch.device("cpu"))
    loss = problem.loss(x[:, :1] + 1, splits.train.inputs, splits.train.targets)
    assert float(loss) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("def make(): return 3", "returned int"),
        ("", "has no function 'make'"),
        ("make = 3", "has no function 'make'"),
        (
            "from minifisher_lab.problems import Problem\nimport torch\n"
            "def make(): return Problem('p', lambda: torch.ones(3), lambda: torch.nn.Linear(1, 1))",
            "must be four tensors",
        ),
        (
            "from minifisher_lab.problems import Problem\nimport torch\nx = torch.ones(3, 1)\n"
            "def make(): return Problem('p', lambda: (x, x[:2], x, x), lambda: torch.nn.Linear(1, 1))",
            "3 training inputs and 2 training targets",
        ),
        (
            "from minifisher_lab.problems import Problem\n"
            "def make(): return Problem('a/b', lambda: (), lambda: None)",
            "becomes a folder",
        ),
    ],
)
def test_what_is_wrong_with_a_problem_of_ones_own(made: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(made)
    code, output = _invoke("train", f"{tmp_path / 'mine.py'}:make", "--folder", tmp_path / "runs")
    assert code == 2
    assert expected in " ".join(output.replace("│", " ").split())


def test_a_module_that_is_not_there_is_named() -> None:
    code, output = _invoke("compare", "no_such_module:make")
    assert code == 2
    assert "no module no_such_module" in output


def test_json_is_all_that_goes_to_the_standard_output(tmp_path: Path) -> None:
    arguments = [
        "compare",
        f"{OWN}:make_problem",
        "--epochs",
        "1",
        "--points",
        "2",
        "--json",
        "--threads",
        "1",
    ]
    result = CliRunner().invoke(cli.app, [*arguments, "--folder", str(tmp_path)], env=WIDE)
    record = json.loads(result.stdout)
    assert record["problem"] == "halves"
    assert Path(record["folder"]) == _only_folder(tmp_path)
    for command in (("problems",), ("optimizers",), ("optimizers", "kfac"), ("data", "list")):
        assert json.loads(CliRunner().invoke(cli.app, [*command, "--json"]).stdout)


def test_several_problems_make_one_json_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ("--optimizers", "sgd", "--epochs", "0.1", "--points", "1", "--json", "--folder", str(tmp_path))
    command = ["compare", "autoencoder-digits", "cnn-digits", *short]
    result = CliRunner().invoke(cli.app, command, env=WIDE)
    assert [record["problem"] for record in json.loads(result.stdout)] == command[1:3]
    monkeypatch.setattr(RunFolder, "log", _interrupted)
    result = CliRunner().invoke(cli.app, command, env=WIDE)
    assert result.exit_code == 130
    assert len(json.loads(result.stdout)) == 1


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_errors_beside_json_go_to_the_standard_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIFISHER_DATA", str(tmp_path / "c[/b]x[y]"))
    short = ["--epochs", "0.1", "--points", "1", "--json", "--folder", str(tmp_path)]
    result = CliRunner().invoke(cli.app, ["train", "vgg16-cifar10", *short], env=WIDE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "cifar10" in result.stderr
    monkeypatch.setattr("minifisher_lab.files.write", _full)
    result = CliRunner().invoke(cli.app, ["train", "autoencoder-digits", *short], env=WIDE)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "cannot write" in result.stderr


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["x[y]", "c[/b]x"])
def test_brackets_in_paths_are_printed(name: str, tmp_path: Path) -> None:
    parent = tmp_path / name
    short = ("autoencoder-digits", "--epochs", 0.1, "--folder", parent)
    code, output = _invoke("train", *short, "--optimizer", "sgd", "--points", 1)
    assert code == 0, output
    assert f"{parent}/" in output
    code, output = _invoke("tune", *short, "--optimizer", "sgd", "--trials", 1)
    assert code == 0, output
    assert f"All trials: {parent}/" in output


def test_the_best_rate_at_the_edge_of_a_grid_is_followed_outward(tmp_path: Path) -> None:
    short = ("--epochs", 0.25, "--points", 1, "--tune", "--optimizers", "sgd")
    code, output = _invoke("compare", f"{OWN}:make_problem", *short, "--folder", tmp_path)
    assert code == 0, output
    tried = {run["rate"] for run in json.loads((_only_folder(tmp_path) / "results.json").read_text())["runs"]}
    assert tried > set(choose("sgd").grid)
    assert max(tried) == 0.3  # three rates beyond the grid, no more


def test_a_busy_machine_and_too_many_threads_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "load_average", lambda: 100.0)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    busy, threads = machine.warnings()
    assert "100.0 processes want its 1 cores" in busy
    assert "4 threads share 1 cores" in threads


@pytest.mark.parametrize("width", [60, 80])
def test_a_table_loses_no_digits_on_a_narrow_terminal(width: int) -> None:
    names = ("adamw", "mbf:power=0.5:graft=None:fisher=empirical")
    runs = [
        Run("p", name, 1e-3, seed, "finished", 9, 123.4, 10, 40, 0, 1.0, 91.25 + seed, [point])
        for name in names
        for seed in (0, 1)
        for point in [Point(0, 0, 100.0, 1.0, 0.00123456 * (1 + seed), 1.0, 90.0)]
    ]
    plan = Plan(PROBLEMS["cnn-digits"], (), (0, 1), Budget(epochs=1))
    console = Console(width=width, file=io.StringIO())
    console.print(report.table(plan, runs, width))
    printed = console.file.getvalue()
    assert "…" not in printed
    for number in ("0.001852", "± 0.000873", "91.8", "0.001", "123.4", "100.0", "13711"):
        assert number in printed


def test_the_first_trial_has_the_defaults_of_all_that_is_searched() -> None:
    for name in minifisher.METHODS:
        search = Search(PROBLEMS["cnn-digits"], choose(name), Budget(epochs=1), 1)
        method = minifisher.METHODS[name]
        assert search.defaults == {key: method.options[key].default for key in ("lr", "damping")}
        space = search.distributions()
        assert all(space[key].low <= value <= space[key].high for key, value in search.defaults.items())


def test_the_table_of_trials_says_which_were_cut_short() -> None:
    search = Search(PROBLEMS["cnn-digits"], choose("adamw"), Budget(epochs=1), 2)
    space, states = search.distributions(), optuna.trial.TrialState
    trials = [
        optuna.create_trial(
            state=state, value=1.5, params={"lr": rate}, distributions=space,
            intermediate_values={1: 2.0, 2: 1.5},
        )
        for state, rate in ((states.COMPLETE, 1e-3), (states.PRUNED, 1e-2))
    ]  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(report.trial_table(search, trials))
    assert "the defaults" in console.file.getvalue()
    assert "cut short after 2 of 21 points" in console.file.getvalue()


def test_optimizers_name_lists_every_argument_with_its_meaning() -> None:
    code, output = _invoke("optimizers", "mbf")
    assert code == 0
    for option in minifisher.MBF.options.values():
        if option.init and option.name not in ("params", "model", "lr"):
            assert f"{option.name} = {option.default!r}  {option.range}" in output
            assert option.meaning[:40] in " ".join(output.split())
    assert "momentum" in _invoke("optimizers", "sgd")[1]
    assert "power=0.5" in _invoke("optimizers", "mbf:power=0.5")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        "-h",
        "--version",
        "train -h",
        "problems",
        "optimizers",
        "optimizers mbf",
        "optimizers mbf --json",
        "data list",
    ],
)
def test_help_and_lists_import_no_torch(arguments: str) -> None:
    """What Python says it imports: seconds depend on the machine."""
    command = [sys.executable, "-X", "importtime", "-m", "minifisher", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "minifisher_lab.cli" in imported
    assert not imported & {"torch", "matplotlib", "sklearn", "optuna", "scipy.sparse", "scipy.ndimage"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train cnn-dig", "cnn-digits"),
        ("train cnn-digits --optimizer kb", "kbfgs"),
        ("compare cnn-digits --optimizers adamw,sha", "adamw,shampoo"),
        ("data get citese", "citeseer"),
        ("sui", "suite"),
    ],
)
def test_a_shell_completes_names_without_torch(words: str, expected: str) -> None:
    asked = {"COMP_WORDS": f"minifisher {words}", "COMP_CWORD": str(len(words.split()))}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from minifisher_lab.__main__ import main; main()"],
        env={**os.environ, **asked, "_MINIFISHER_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout.splitlines()
    assert " torch\n" not in done.stderr


def test_the_package_itself_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "minifisher", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("minifisher ")


def test_ctrl_c_ends_the_whole_command_with_the_table_so_far(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minifisher_lab", "compare", "autoencoder-digits", "cnn-digits"]
    command += ["--optimizers", "sgd", "--seconds", "30", "--folder", str(tmp_path)]
    # A shell's background job ignores Ctrl-C, and so would its children.
    wait = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=wait) as process:
        while not list(tmp_path.glob("*/*.jsonl")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "sgd: 1 of 1 interrupted" in output
    assert (_only_folder(tmp_path) / "results.json").exists()


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        (("train", "autoencoder-digits", "--optimizer", "sgd"), "results.json"),
        (("tune", "autoencoder-digits", "--optimizer", "sgd"), "trials.json"),
        (("demo",), "results.json"),
    ],
)
def test_ctrl_c_exits_with_130_and_keeps_the_results(
    command: tuple[str, ...], kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(folder: RunFolder, run: Run, point: Point) -> None:
        if point.step:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "log", impatient)
    code, output = _invoke(*command, "--folder", tmp_path)
    assert code == 130, output
    assert (_only_folder(tmp_path) / kept).exists()


def test_tune_flag_gives_every_optimizer_its_grid() -> None:
    found = candidates.candidates("adamw,sgd", True, ("sgd=0.5",))
    assert [c.rate for c in found if c.choice.name == "adamw"] == list(choose("adamw").grid)
    assert [c.rate for c in found if c.choice.name == "sgd"] == [0.5]


@pytest.mark.parametrize(
    "rates", [("adamw=3e-3,1e-3,0.003,0.0030000000001",), ("adamw=3e-3", "adamw=1e-3", "adamw=3e-3")]
)
def test_a_rate_or_an_optimizer_given_twice_runs_once(rates: tuple[str, ...]) -> None:
    assert candidates.candidates("adamw, adamw", False, rates) == (
        Candidate(choose("adamw"), 3e-3),
        Candidate(choose("adamw"), 1e-3),
    )


def test_tune_writes_its_trials(tmp_path: Path) -> None:
    code, output = _invoke(
        *(
            "tune",
            "autoencoder-digits",
            "--optimizer",
            "adamw",
            "--trials",
            3,
            "--epochs",
            0.5,
            "--folder",
            tmp_path,
        )
    )
    assert code == 0, output
    trials = json.loads((_only_folder(tmp_path) / "trials.json").read_text())["trials"]
    assert len(trials) == 3
    assert trials[0]["lr"] == pytest.approx(1e-3)
    assert "Best: adamw with lr=" in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "autoencoder-digit"), "did you mean autoencoder-digits"),
        (("compare", "cnn-digits", "--optimizers", "adamv"), "did you mean"),
        (("compare", "cnn-digits", "--optimizers", "adamw", "--lr", "adamv=1"), "did you mean adamw"),
        (("compare", "cnn-digits", "--optimizers", "adamw", "--lr", "adamw=fast"), "rates above 0"),
        (
            ("compare", "cnn-digits", "--optimizers", "adamw", "--seconds", "1", "--epochs", "1"),
            "either seconds",
        ),
        (("train", "cnn-digits", "--epochs", "0"), "epochs must be above 0, got 0"),
        (("compare", "cnn-digits", "--optimizers", "adamw", "--seconds", "0"), "seconds must be above 0"),
        (("tune", "cnn-digits", "--optimizer", "adamw", "--epochs", "-1"), "epochs must be above 0, got -1"),
        (("demo", "--seconds", "0"), "seconds must be above 0, got 0"),
        (("train", "cnn-digits", "--optimizer", "sgd:momentun=0.5"), "momentun"),
        (("tune", "cnn-digits", "--optimizer", "sgd:momentun=0.5"), "momentun"),
        (("train", "cnn-digits", "--optimizer", "sgd", "--lr", "-1"), "Invalid learning rate"),
        (("train", "cnn-digits", "--optimizer", "mbf:lr=0.5"), "--lr NAME=0.5"),
        (("train", "cnn-digits", "--optimizer", "sgd", "--seed", str(2**64)), str(2**63 - 1)),
        (("train", "cnn-digits", "--optimizer", "mbf:blocksize=64"), "did you mean 'block_size'"),
        (
            ("train", "cnn-digits", "--seconds", "1", "--epochs", "1"),
            "give either seconds or epochs, not both",
        ),
        (("optimizers", "mbv"), "did you mean"),
        (("data", "get", "minst"), "did you mean mnist"),
    ],
)
def test_wrong_arguments_get_a_helpful_message(arguments: tuple[str, ...], expected: str) -> None:
    code, output = _invoke(*arguments)
    assert code == 2
    assert expected in output


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_an_unusable_device_is_a_command_line_error(device: str) -> None:
    code, output = _invoke("train", "cnn-digits", "--optimizer", "sgd", "--device", device)
    assert code == 2
    assert f"cannot compute on '{device}'" in output


@pytest.mark.parametrize(
    "command", [("train", "autoencoder-digits"), ("tune", "autoencoder-digits"), ("demo",)]
)
@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_folder_that_cannot_be_created_is_an_error_before_the_first_run(
    command: tuple[str, ...], inside: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    code, output = _invoke(*command, "--folder", tmp_path / "taken" / inside)
    assert code == 2
    assert "cannot create a run folder in" in output
    assert "Not a directory" in output


def test_the_message_for_missing_data_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIFISHER_DATA", str(tmp_path))
    code, output = _invoke(
        "compare", "autoencoder-mnist", "--optimizers", "adamw", "--folder", tmp_path / "runs"
    )
    assert code == 1
    assert "minifisher data get mnist" in output
    assert not (tmp_path / "runs").exists()


def test_data_list_shows_every_dataset() -> None:
    code, output = _invoke("data", "list")
    assert code == 0
    assert all(name in output for name in ("digits", "mnist", "cifar10"))


def test_data_get_needs_no_download_for_an_embedded_dataset() -> None:
    code, output = _invoke("data", "get", "digits")
    assert code == 0
    assert "digits is ready" in output


def test_demo_gives_adamw_three_rates_and_mbf_its_default(tmp_path: Path) -> None:
    plan = demo.plan(0.05)
    rates = {name: [c.rate for c in plan.candidates if c.choice.name == name] for name in ("adamw", "mbf")}
    assert len(rates["adamw"]) >= 3
    assert rates["mbf"] == [choose("mbf").rate]
    assert len(plan.seeds) >= 3
    code, output = _invoke("demo", "--seconds", 0.05, "--folder", tmp_path)
    assert code == 0, output
    assert "MBF (lr" in output
    assert (_only_folder(tmp_path) / "loss-seconds.png").exists()


def test_without_the_laboratorys_packages_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without_typer(name: str, *rest: object) -> object:
        if name == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.delitem(sys.modules, "minifisher_lab.cli")
    monkeypatch.setattr(builtins, "__import__", without_typer)
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == "The command line needs typer: pip install 'minifisher[lab]'"


def test_schedule_warm_up_and_start_of_a_problem_can_be_changed(tmp_path: Path) -> None:
    changes = ("--schedule", "cosine", "--warm-up", 0.25, "--initialisation", "fan-out")
    small = ("--optimizers", "sgd", "--epochs", 0.1, "--folder", tmp_path)
    code, output = _invoke("compare", "cnn-digits", *small, *changes)
    assert code == 0, output
    results = json.loads((_only_folder(tmp_path) / "results.json").read_text())
    assert [results[name] for name in ("schedule", "warm_up", "initialisation")] == [
        "cosine",
        0.25,
        "fan-out",
    ]
    code, output = _invoke("compare", "cnn-digits", *small, "--warm-up", 1)
    assert code == 2
    assert "warm-up" in output


def test_the_options_change_the_problem_that_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Problem] = []

    class Watched(train_module.Trainer):
        def __init__(self, problem: Problem, *rest: object) -> None:
            seen.append(problem)
            super().__init__(problem, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("minifisher_lab.comparison.compare.Trainer", Watched)
    small = ("--optimizer", "sgd", "--epochs", 0.1, "--folder", tmp_path)
    assert _invoke("train", "cnn-digits", *small, "--schedule", "thirds", "--warm-up", 0.5)[0] == 0
    assert _invoke("train", "cnn-digits", *small)[0] == 0
    assert [(problem.schedule, problem.warm_up) for problem in seen] == [("thirds", 0.5), ("linear", 0.0)]


@pytest.mark.parametrize("width", [80, 100])
def test_the_list_of_problems_is_whole_on_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.console, "width", width)
    lines = _invoke("problems")[1].splitlines()
    assert max(map(len, lines)) <= width
    for problem in PROBLEMS.values():
        (at,) = [index for index, line in enumerate(lines) if line.split()[:1] == [problem.name]]
        shown = " ".join(" ".join(lines[at : at + 3]).split())
        assert problem.description in shown
        assert f"{problem.batch_size} {problem.epochs:g} {problem.parameters():,}" in shown


def test_problems_say_what_runs_offline_and_how_long_an_epoch_took() -> None:
    epoch_times.keep(Run("vit-digits", "adamw", 1e-3, 0, steps=440, seconds=8.8), 22)
    code, output = _invoke("problems")
    assert code == 0
    lines = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    assert lines["vit-digits"].split()[1:4] == ["digits", "offline", "small"]
    assert lines["vit-digits"].endswith("0.44 s adamw")
    assert lines["vgg16-svhn"].split()[3] == "full"
    kinds = [line for line in output.splitlines() if line in FAMILIES or line.strip() in FAMILIES]
    assert [line.strip() for line in kinds] == list(FAMILIES)
