from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from minifisher_lab.training import epoch_times
from minifisher_lab.training.runs import Run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(epoch_times, "path", lambda: tmp_path / "deep" / "times.json")


def _run(optimizer: str, steps: int, seconds: float) -> Run:
    return Run("cnn-digits", optimizer, 1e-3, 0, steps=steps, seconds=seconds)


def test_the_time_of_an_epoch_is_kept_by_problem_and_optimizer() -> None:
    epoch_times.keep(_run("mbf", 40, 2.0), 22)
    epoch_times.keep(_run("adamw", 40, 1.0), 22)
    epoch_times.keep(_run("adamw", 40, 4.0), 22)
    assert epoch_times.known() == {"cnn-digits": {"mbf": 1.1, "adamw": 2.2}}
    assert epoch_times.shown(epoch_times.known()["cnn-digits"]) == ("adamw", 2.2)
    assert epoch_times.shown({"mbf": 1.1, "sgd": 1.0}) == ("mbf", 1.1)
    assert epoch_times.shown({}) is None


def test_a_few_steps_are_no_measurement() -> None:
    epoch_times.keep(_run("adamw", 19, 1.0), 22)
    assert epoch_times.known() == {}


def test_a_damaged_file_is_as_none_and_is_written_anew() -> None:
    epoch_times.path().parent.mkdir()
    epoch_times.path().write_text("[")
    assert epoch_times.known() == {}
    epoch_times.keep(_run("sgd", 40, 1.0), 40)
    assert epoch_times.known() == {"cnn-digits": {"sgd": 1.0}}


def test_a_cache_that_cannot_be_written_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(epoch_times, "path", lambda: tmp_path / "file" / "times.json")
    epoch_times.keep(_run("sgd", 40, 1.0), 40)
