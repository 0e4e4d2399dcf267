from __future__ import annotations

import builtins
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

import minifisher
from minifisher_lab import __main__, cli
from minifisher_lab.comparison import candidates
from minifisher_lab.comparison.compare import Candidate
from minifisher_lab.presentation import demo
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Point, Run, RunFolder

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
