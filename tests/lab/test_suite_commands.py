from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from minifisher_lab import cli
from minifisher_lab.comparison.worker import Worker

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
