from __future__ import annotations

import random
import sqlite3
from typing import TYPE_CHECKING

import pytest
import torch
from typer.testing import CliRunner

from minifisher_lab import cli
from minifisher_lab.comparison import results
from minifisher_lab.comparison.study import Record, StudyError, StudyFile, now
from minifisher_lab.comparison.suite import make_plan, open_study
from minifisher_lab.comparison.worker import Worker
from minifisher_lab.training.runs import Point, Run

if TYPE_CHECKING:
    from pathlib import Path

TINY = ("--problems", "cnn-digits", "--optimizers", "adamw,sgd", "--trials", "2", "--seeds", "1")
STEPS = ("--epochs", "0.1")


def _invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_suite_then_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "width", 200)
    study = tmp_path / "deep" / "tiny.sqlite"
    code, output = _invoke("suite", "small", "--study", study, *TINY, *STEPS)
    assert code == 0, output
    assert "6 of 6 runs are done" in output
    assert output.count("✓") == 6
    code, output = _invoke("suite", "small", "--study", study, *TINY, *STEPS)
    assert (code, output.count("✓")) == (0, 0)
    code, output = _invoke("report", study)
    assert code == 0, output
    assert (study.parent / "tiny-report" / "report.html").exists()
    code, output = _invoke("suite", "small", "--study", study, *TINY, "--epochs", "0.2")
    assert (code, "was made with epochs" in output) == (2, True)


def test_ctrl_c_exits_with_130_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    study = ("--study", tmp_path / "tiny.sqlite", *TINY, *STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_trained", interrupted)
        code, output = _invoke("suite", "small", *study)
    assert code == 130
    assert "0 of 6 runs are done. The same command continues." in output
    assert _invoke("suite", "small", *study)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("suite", "small", "--problems", "cnn-digit"), "did you mean cnn-digits"),
        (("suite", "small", "--optimizers", "adamv"), "did you mean adam"),
        (("suite", "tiny"), "small"),
        (("suite", "small", *TINY, "--study", "/dev/null/study"), "cannot make /dev/null/study"),
        (("suite", "small", *TINY, "--study", "/proc/x.sqlite"), "cannot make /proc/x.sqlite"),
        (("inspect", "cnn-digits", "--picture", "x.xyz"), "--picture x.xyz must end in one of"),
        (("inspect", "cnn-digits", "--picture", "/proc/x.png"), "name another place with --picture"),
        (("report", "nowhere.sqlite"), "there is no study nowhere.sqlite"),
        (("inspect", "vgg16-cifar10"), "inspect one of autoencoder-digits"),
    ],
)
def test_wrong_arguments_get_a_helpful_message(arguments: tuple[str, ...], expected: str) -> None:
    code, output = _invoke(*arguments)
    assert code == 2
    assert expected in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize("option", ["--epochs", "--budget"])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf"])
def test_a_wrong_number_is_refused_before_a_study_is_made(option: str, value: str, tmp_path: Path) -> None:
    study = tmp_path / "tiny.sqlite"
    code, output = _invoke("suite", "small", "--study", study, *TINY, *STEPS, option, value)
    assert code == 2
    assert f"{option} must be a finite number above 0, got {value}" in " ".join(output.split())
    assert not list(tmp_path.iterdir())


def _study(path: Path) -> StudyFile:
    """A finished study with invented runs."""
    plan = make_plan("small", ["cnn-digits"], ["adamw", "sgd"], trials=2, seeds=2, epochs=1.0)
    study, _ = open_study(path, plan, torch.device("cpu"))
    for unit in plan.units():
        points = [Point(step, step / 10, step / 50, 1.0, 1 / (1 + step), 2.0, 0.5) for step in range(5)]
        run = Run(unit.problem, unit.entrant, 0.1, unit.number, "finished", 4, 0.1, 10, 10, points=points)
        study.finish(Record(unit, {"lr": 0.1}, run, run.best_loss, now(), now()), {})
    return study


def test_a_report_that_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    study = _study(tmp_path / "tiny.sqlite").path
    for folder in ("/proc/report", "/dev/null/report"):
        for reported in (study, tmp_path):
            code, output = _invoke("report", reported, "--folder", folder)
            assert code == 2
            assert f"cannot write {folder}" in output
            assert "name another place with --folder" in " ".join(output.replace("│", " ").split())


PAGE = 4096  # bytes that SQLite writes at once


def test_a_damaged_study_is_one_clear_error(tmp_path: Path) -> None:
    study = _study(tmp_path / "tiny.sqlite").path
    content, noise = study.read_bytes(), random.Random(0)
    refused = []
    for start in range(PAGE, len(content), PAGE):
        study.write_bytes(content[:start] + noise.randbytes(PAGE) + content[start + PAGE :])
        try:
            results.read(StudyFile(study))
        except StudyError as error:
            refused.append((start, str(error)))
    start = next(start for start, text in refused if "is damaged" in text)
    study.write_bytes(content[:start] + noise.randbytes(PAGE) + content[start + PAGE :])
    for command in (("report", study), ("suite", "small", "--study", study, *TINY, "--seeds", "2", *STEPS)):
        code, output = _invoke(*command)
        assert code == 2, output
    assert any("is no study" in text for _, text in refused)


def test_a_study_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(StudyFile, "claim", read_only)
    code, output = _invoke("suite", "small", "--study", tmp_path / "tiny.sqlite", *TINY, *STEPS)
    assert code == 1
    assert "tiny.sqlite (OperationalError: attempt to write a readonly database)" in output
    assert "the same command continues" in output
