from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from minifisher_lab.comparison import compare
from minifisher_lab.comparison.compare import Candidate, Plan
from minifisher_lab.presentation import plots
from minifisher_lab.presentation.session import run_plan
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Run, RunFolder
from minifisher_lab.training.train import Budget, evaluate

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from minifisher_lab.problems import Problem
    from minifisher_lab.training.batches import Samples, Splits


def _plan(
    *entrants: tuple[str, float], epochs: float = 2, seeds: int = 2, problem: str = "autoencoder-digits"
) -> Plan:
    candidates = tuple(Candidate(choose(name), rate) for name, rate in entrants)
    return Plan(PROBLEMS[problem], candidates, tuple(range(seeds)), Budget(epochs=epochs), points=4)


def _shown(plan: Plan, splits: Splits, folder: RunFolder) -> tuple[list[Run], str]:
    console = Console(width=100, record=True, quiet=False, force_terminal=False)
    runs = run_plan(plan, splits, folder, console)
    return runs, console.export_text()


def test_a_comparison_writes_points_results_and_plots_and_prints_a_table(
    digits: Splits, tmp_path: Path
) -> None:
    plan = _plan(("adamw", 1e-3), ("adamw", 3e-3), ("sgd", 1e-2))
    runs, text = _shown(plan, digits, RunFolder(tmp_path))
    assert len(runs) == 6
    for run in runs:
        lines = [json.loads(line) for line in (tmp_path / f"{run.name}.jsonl").read_text().splitlines()]
        assert [line["train_loss"] for line in lines] == [point.train_loss for point in run.points]
        assert set(lines[0]) >= {"step", "epoch", "seconds", "batch_loss", "train_loss", "test_loss"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["optimizer"] for entry in results["best"]} == {"adamw", "sgd"}
    assert len(results["all"]) == 3
    assert results["machine"]["threads"] == 1
    for name in ("loss-seconds.png", "loss-epochs.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (1280, 768)
    assert "adamw's" in text
    assert "is the best of 0.001, 0.003" in text


def test_results_and_table_come_before_the_plots(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no plots today")

    monkeypatch.setattr(plots, "plot", failing)
    console = Console(width=100, record=True, force_terminal=False)
    with pytest.raises(RuntimeError, match="no plots today"):
        run_plan(_plan(("sgd", 1e-2), epochs=0.2, seeds=1), digits, RunFolder(tmp_path), console)
    assert "Best loss" in console.export_text()
    assert (tmp_path / "results.json").exists()


def test_a_classifier_has_an_accuracy(tmp_path: Path) -> None:
    plan = _plan(("adamw", 3e-3), problem="cnn-digits", epochs=3, seeds=1)
    splits = batches.load(plan.problem, torch.device("cpu"))
    runs, text = _shown(plan, splits, RunFolder(tmp_path))
    assert runs[0].test_accuracy is not None
    assert runs[0].test_accuracy > 80
    assert f"  {runs[0].test_accuracy:.1f}  " in text


def test_every_optimizer_starts_from_the_same_weights_on_the_same_seed(
    digits: Splits, tmp_path: Path
) -> None:
    runs, _ = _shown(_plan(("adamw", 1e-3), ("sgd", 1e-2), epochs=0.2), digits, RunFolder(tmp_path))
    starts = {(run.seed, run.points[0].train_loss) for run in runs}
    assert len(starts) == 2


def test_runs_are_interleaved_by_seed_and_take_turns(digits: Splits) -> None:
    order = [
        (seed, candidate.choice.name)
        for seed, candidate in _plan(("adamw", 1e-3), ("sgd", 1e-2), seeds=3).order()
    ]
    names = [(0, "adamw"), (0, "sgd"), (1, "sgd"), (1, "adamw"), (2, "adamw"), (2, "sgd")]
    assert order == names


def test_ctrl_c_keeps_what_was_measured(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(RunFolder):
        def log(self, run: Run, point: object) -> None:
            super().log(run, point)  # type: ignore[arg-type]
            if (run.optimizer, run.seed, len(run.points)) == ("sgd", 0, 3):
                raise KeyboardInterrupt

    runs, text = _shown(_plan(("adamw", 1e-3), ("sgd", 1e-2)), digits, Impatient(tmp_path))
    assert [(run.optimizer, run.status) for run in runs] == [("adamw", "finished"), ("sgd", "interrupted")]
    assert len((tmp_path / "sgd-lr0.01-seed0.jsonl").read_text().splitlines()) == 3
    assert "sgd: 1 of 1 interrupted" in text
    assert "Best loss" in text
    assert (tmp_path / "results.json").exists()
    assert (tmp_path / "loss-seconds.png").exists()


def test_ctrl_c_before_the_first_point_prints_a_message(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "warm_up", interrupted)
    runs, text = _shown(_plan(("adamw", 1e-3)), digits, RunFolder(tmp_path))
    assert runs == []
    assert "before anything was measured" in text


def test_ctrl_c_during_the_final_evaluation_interrupts_the_run(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(problem: Problem, model: nn.Module, samples: Samples) -> tuple[float, float | None]:
        if samples is digits.test:
            raise KeyboardInterrupt
        return evaluate(problem, model, samples)

    monkeypatch.setattr("minifisher_lab.training.train.evaluate", impatient)
    plan = _plan(("sgd", 1e-2), epochs=0.2, seeds=1)
    runs, _ = _shown(plan, digits, RunFolder(tmp_path))
    assert [run.status for run in runs] == ["interrupted"]
    assert not plan.completed(runs)


def test_a_diverged_run_stays_in_points_table_and_results(digits: Splits, tmp_path: Path) -> None:
    runs, text = _shown(_plan(("adamw", 1e-3), ("sgd", 1e6), seeds=1), digits, RunFolder(tmp_path))
    assert "sgd: 1 of 1 diverged" in text
    last = (tmp_path / f"{runs[1].name}.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["batch_loss"] is None  # strict JSON has no NaN
    results = json.loads((tmp_path / "results.json").read_text())
    assert {run["optimizer"]: run["status"] for run in results["runs"]} == {
        "adamw": "finished",
        "sgd": "diverged",
    }


def test_ctrl_c_in_the_rounds_beyond_the_grid_leaves_them_to_be_done(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, warm_up = [], compare.warm_up

    def impatient(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        warm_up(*arguments)

    monkeypatch.setattr(compare, "warm_up", impatient)
    plan = replace(_plan(("sgd", 1e-6), ("sgd", 2e-6), epochs=0.2, seeds=1), follow=True)
    runs, _ = _shown(plan, digits, RunFolder(tmp_path))
    assert [run.status for run in runs] == ["finished", "finished"]
    assert not plan.completed(runs)
