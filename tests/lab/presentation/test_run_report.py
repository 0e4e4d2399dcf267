"""A web page about the run folder of every command that makes one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minifisher_lab.cli import app
from minifisher_lab.comparison.summary import Spread
from minifisher_lab.presentation import demo
from minifisher_lab.presentation.suite_report import with_interval

OWN = f"{Path(__file__).parents[3] / 'examples' / 'own_problem.py'}:make_problem"
SHORT = ("--epochs", "0.5", "--points", "4")


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def measured(folder: Path, *words: str) -> Path:
    code, output = run(*words, "--folder", str(folder))
    assert code == 0, output
    (made,) = folder.iterdir()
    return made


def page_of(folder: Path) -> str:
    code, output = run("report", str(folder))
    assert code == 0, output
    text = (folder / "report.html").read_text()
    assert "src=" not in text  # needs no other file
    assert "<link" not in text
    return text


def test_a_comparison_of_a_problem_of_ones_own(tmp_path: Path) -> None:
    names = ("--optimizers", "adamw,mbf:power=0.5", "--seeds", "2")
    made = measured(tmp_path, "compare", OWN, *names, *SHORT, "--lr", "adamw=1e-3,1e-2")
    text = page_of(made)
    results = json.loads((made / "results.json").read_text())
    assert "compare: halves" in text
    assert "2 optimizers, 2 seeds, 0.5 epochs a run" in text
    for row in results["all"]:
        assert f"<td>{row['optimizer']}</td><td>{row['rate']:g}</td>" in text
        assert f"<td>{with_interval(Spread(**row['best_loss']), count=2)}</td>" in text
    assert text.count("<svg") == 4  # loss and accuracy, against seconds and epochs
    assert "Every learning rate that was tried" in text


def test_one_run_has_no_second_table(tmp_path: Path) -> None:
    text = page_of(measured(tmp_path, "train", "autoencoder-digits", "--optimizer", "sgd", *SHORT))
    assert "1 optimizer, 1 seed, 0.5 epochs a run" in text
    assert "64-400-200-50-10" in text
    assert "Every learning rate" not in text


def test_a_search_lists_every_trial(tmp_path: Path) -> None:
    made = measured(tmp_path, "tune", "autoencoder-digits", "--optimizer", "mbf", "--trials", "3", *SHORT[:2])
    text = page_of(made)
    trials = json.loads((made / "trials.json").read_text())["trials"]
    for trial in trials:
        assert f"<td>{trial['number']}</td><td>{trial['lr']:.3g}</td><td>{trial['damping']:.3g}</td>" in text
    assert "3 trials of mbf" in text
    assert "trial 0" in text


def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SEEDS", (0,))
    assert "demo: autoencoder-digits" in page_of(measured(tmp_path, "demo", "--seconds", "0.05"))


def test_a_run_that_was_stopped_is_said_to_be(tmp_path: Path) -> None:
    made = measured(tmp_path, "compare", OWN, "--optimizers", "adamw,sgd", *SHORT)
    path = made / "results.json"
    results = json.loads(path.read_text())
    results["runs"][1]["status"] = "interrupted"
    path.write_text(json.dumps(results))
    assert "Interrupted: 1 of at least 2 runs" in page_of(made)


def test_a_folder_without_results_says_what_to_do(tmp_path: Path) -> None:
    code, output = run("report", str(tmp_path))
    assert code == 2
    assert "has no plan.json: give a study, or the folder of a run that has ended" in output
    (tmp_path / "plan.json").write_text("{")
    assert "damaged" in run("report", str(tmp_path))[1]


def test_a_damaged_file_of_points_is_named(tmp_path: Path) -> None:
    made = measured(tmp_path, "train", "autoencoder-digits", "--optimizer", "sgd", *SHORT)
    (points,) = made.glob("*.jsonl")
    points.write_bytes(points.read_bytes()[:-20])
    code, output = run("report", str(made))
    assert code == 2
    assert f"{points.name} is damaged" in output.replace(" ", "").replace("isdamaged", " is damaged")
