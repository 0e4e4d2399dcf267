"""--resume, a full disk and wrong arguments on the command line."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from minifisher_lab import cli, files
from minifisher_lab.comparison import candidates
from minifisher_lab.presentation import plots
from minifisher_lab.training.runs import Point, Run, RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DIGITS = "autoencoder-digits"
COMMANDS = {
    "train": ("train", DIGITS, "--optimizer", "sgd", "--epochs", "1", "--points", "4"),
    "compare": ("compare", DIGITS, "--optimizers", "sgd,adamw", "--epochs", "0.5", "--points", "3"),
    "tune": ("tune", DIGITS, "--optimizer", "mbf", "--trials", "4", "--epochs", "0.4"),
}
RESULTS = {"train": "results.json", "compare": "results.json", "tune": "trials.json"}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "width", 200)
    monkeypatch.setattr(plots, "plot", lambda *_: [])  # drawing takes longer than all the rest


def _invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C when so many points are logged."""
    log, count = RunFolder.log, iter(range(1, after + 1))

    def impatient(folder: RunFolder, run: Run, point: Point) -> None:
        log(folder, run, point)
        if next(count) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "log", impatient)


def _timeless(folder: Path) -> dict[str, object]:
    """The losses of every point and, of a search, all settings."""
    points = {
        path.name: [json.loads(line)["train_loss"] for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }
    trials = folder / "trials.json"
    return {**points, "trials": json.loads(trials.read_text())["trials"] if trials.exists() else None}


@pytest.mark.parametrize(
    ("command", "after", "given"),
    [
        ("train", 3, "everything"),
        ("compare", 6, "only the folder"),
        ("tune", 5, "everything"),
        ("tune", 24, "only the folder"),
    ],
)
def test_a_stopped_command_goes_on_where_it_stopped(
    command: str, after: int, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "cut"):
        with monkeypatch.context() as patch:
            if name == "cut":
                _interrupt(patch, after)
            code, output = _invoke(*COMMANDS[command], "--folder", tmp_path / name)
        assert code == (130 if name == "cut" else 0), output
    (whole,), (cut,) = ((tmp_path / name).iterdir() for name in ("whole", "cut"))
    before = {path.name: path.read_text() for path in cut.glob("*.jsonl")}
    assert _timeless(cut) != _timeless(whole)
    arguments = COMMANDS[command] if given == "everything" else (command,)
    code, output = _invoke(*arguments, "--resume", cut)
    assert code == 0, output
    assert _timeless(cut) == _timeless(whole)
    assert list((tmp_path / "cut").iterdir()) == [cut]
    for name, text in before.items():
        first = text.splitlines()[:-1]  # the last one was logged, but its checkpoint was not written
        assert (cut / name).read_text().splitlines()[: len(first)] == first  # seconds too: not measured again


def test_a_finished_command_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in COMMANDS:
        _invoke(*COMMANDS[command], "--folder", tmp_path / command)
        (folder,) = (tmp_path / command).iterdir()
        before = {path.name: path.read_text() for path in folder.glob("*.jsonl")}
        with monkeypatch.context() as patch:
            _interrupt(patch, 1)
            code, output = _invoke(command, "--resume", folder)
        assert code == 0
        assert "Best" in output
        assert {path.name: path.read_text() for path in folder.glob("*.jsonl")} == before
        assert not list(folder.glob("*.pt"))


def test_checkpoint_every_keeps_the_final_weights(tmp_path: Path) -> None:
    code, output = _invoke(*COMMANDS["train"], "--checkpoint-every", 5, "--folder", tmp_path)
    assert code == 0, output
    assert len(list(tmp_path.glob("*/*.pt"))) == 1
    (plan,) = tmp_path.glob("*/plan.json")
    stored = json.loads(plan.read_text())
    assert stored["budget"] == {"seconds": None, "epochs": 1.0}
    assert stored["options"]["checkpoint_every"] == stored["checkpoint_every"] == 5


def test_resume_refuses_another_plan(tmp_path: Path) -> None:
    _invoke(*COMMANDS["train"], "--folder", tmp_path)
    (folder,) = tmp_path.iterdir()
    for arguments, expected in (
        (("train", "--resume", folder, "--epochs", 3), "begun with epochs 1.0, not 3.0: leave it out"),
        (("train", "cnn-digits", "--resume", folder), f"begun with problem {DIGITS}, not cnn-digits"),
        (("tune", "--resume", folder), "was begun by `train`, not by `tune`"),
        (("train", "--resume", tmp_path), "it has no plan.json"),
        (("compare", "--resume", tmp_path / "absent"), "it has no plan.json"),
        (("train",), "give a PROBLEM"),
        (("compare",), "give a PROBLEM"),
        (("tune",), "or --resume RUN"),
    ):
        code, output = _invoke(*arguments)
        assert code == 2
        assert expected in output
    (folder / "plan.json").write_text("{")
    code, output = _invoke("train", "--resume", folder)
    assert code == 2
    assert "plan.json cannot be read" in output


# ---- a full disk ----


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_but_plans(write: Callable[..., Path]) -> Callable[..., Path]:
    def full(target: Path, content: bytes) -> Path:
        return write(target, content) if target.name == "plan.json" else _full()  # type: ignore[return-value]

    return full


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_loses_nothing_and_is_one_clear_error(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", _write_but_plans(files.write))
        patch.setattr("minifisher_lab.training.runs._append", _full)
        patch.setattr(plots, "plot", _full)
        code, output = _invoke(*COMMANDS[command], "--folder", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert code == 1
    assert "Best" in output  # the table
    assert "No space left on device" in output
    assert f"--resume {folder}" in output
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    code, output = _invoke(command, "--resume", folder)
    assert code == 0, output
    assert (folder / RESULTS[command]).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_was_full_for_a_moment_loses_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, count = files.write, iter(range(1000))

    def sometimes(target: Path, content: bytes) -> Path:
        return _full() if 2 < next(count) < 6 else append(target, content)  # type: ignore[return-value]

    monkeypatch.setattr(files, "write", sometimes)
    code, output = _invoke(*COMMANDS[command], "--folder", tmp_path)
    assert code == 0, output
    (folder,) = tmp_path.iterdir()
    assert (folder / RESULTS[command]).exists()
    assert all(len(path.read_text().splitlines()) >= 4 for path in folder.glob("*.jsonl"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_full_at_the_start_is_one_clear_error(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "write", _full)
    code, output = _invoke(*COMMANDS[command], "--folder", tmp_path)
    assert code == 1
    assert "plan.json: No space left on device. Free space, or choose another folder" in output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_write_permission_gets_other_advice_than_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    _invoke(*COMMANDS["compare"], "--folder", tmp_path)
    (folder,) = tmp_path.iterdir()
    monkeypatch.setattr(files, "write", forbidden)
    code, output = _invoke("compare", "--resume", folder)
    assert code == 1
    assert "Permission denied" in output
    assert "Make the folder writable, then start it again" in output
    assert "Free space" not in output


# ---- arguments ----


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("adamw:betas=(0.9,)", "IndexError"),
        ("adamw:betas=0.9", "betas"),
        ("adamw:betas=(0.9,0.99,0.999)", "too many values"),
        ("adamw:betas=('a','b')", "betas"),
        ("adamw:betas=(0.9", "betas"),
        ("adamw:eps=None", "None"),
        ("adamw:eps={[]}", "eps"),
        (f"adamw:eps={'(' * 300}", "eps"),
        ("adamw:weight_decay=[1]", "weight_decay"),
        ("sgd:momentum=x", "momentum"),
        ("mbf:power=(1,)", "power"),
        ("mbf:damping={}", "damping"),
        ("muon:betas=1", "betas"),
    ],
)
def test_a_wrong_argument_of_an_optimizer_is_no_traceback(spec: str, expected: str, tmp_path: Path) -> None:
    commands = COMMANDS if spec == "adamw:betas=(0.9,)" else ("train",)
    for command in commands:
        option = "--optimizers" if command == "compare" else "--optimizer"
        code, output = _invoke(command, DIGITS, option, spec, "--epochs", "0.1", "--folder", tmp_path)
        assert code == 2, output
        assert expected in output
        assert spec[:12] in output
    assert list(tmp_path.iterdir()) == []


def test_a_comma_within_brackets_separates_no_names() -> None:
    entrants = candidates.candidates("adamw:betas=(0.8,0.9),sgd,adamw:betas=[0.8,0.9]", False, ())
    assert [entrant.choice.name for entrant in entrants] == [
        "adamw:betas=(0.8,0.9)",
        "sgd",
        "adamw:betas=[0.8,0.9]",
    ]
