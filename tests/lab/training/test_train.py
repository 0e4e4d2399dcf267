from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import Run
from minifisher_lab.training.train import Budget, Trainer, evaluate, rate_factor, state_bytes, train

if TYPE_CHECKING:
    from minifisher_lab.problems import Problem
    from minifisher_lab.training.batches import Splits
    from minifisher_lab.training.runs import Point

PROBLEM = PROBLEMS["autoencoder-digits"]


def _run(
    splits: Splits, name: str, rate: float, *, seed: int = 0, epochs: float = 4, problem: Problem = PROBLEM
) -> Run:
    run = Run(problem.name, name, rate, seed)
    train(run, Trainer(problem, splits, choose(name), rate, seed), splits, Budget(epochs=epochs), points=8)
    return run


@pytest.mark.parametrize(("name", "rate"), [("adamw", 3e-3), ("sgd", 1e-2)])
def test_training_lowers_the_loss(digits: Splits, name: str, rate: float) -> None:
    run = _run(digits, name, rate)
    first, last = run.points[0], run.points[-1]
    assert run.status == "finished"
    assert last.train_loss < 0.75 * first.train_loss
    assert last.test_loss < 0.75 * first.test_loss
    assert last.batch_loss < 0.75 * first.batch_loss


def test_points_are_evenly_spaced_and_the_last_one_is_at_the_end(digits: Splits) -> None:
    run = _run(digits, "sgd", 1e-2)
    assert [point.step for point in run.points] == [0, 7, 14, 21, 28, 35, 42, 49, 56]
    assert run.points[-1].epoch == 4
    assert run.points[-1].step == run.steps
    assert run.points[-1].seconds == run.seconds > 0


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(digits: Splits) -> None:
    first, again, other = (_run(digits, "adamw", 1e-3, seed=seed, epochs=1) for seed in (0, 0, 1))
    assert [point.train_loss for point in first.points] == [point.train_loss for point in again.points]
    assert first.points[-1].train_loss != other.points[-1].train_loss


def test_a_loss_that_is_not_finite_ends_the_run_and_is_recorded(digits: Splits) -> None:
    run = _run(digits, "sgd", 1e6)
    assert run.status == "diverged"
    assert run.steps < 56
    assert not run.points[-1].finite
    assert math.isfinite(run.best_loss)


def test_a_budget_in_seconds_counts_only_training(digits: Splits) -> None:
    run = Run(PROBLEM.name, "sgd", 1e-2, 0)
    train(run, Trainer(PROBLEM, digits, choose("sgd"), 1e-2, 0), digits, Budget(seconds=0.2), points=4)
    assert run.seconds >= 0.2
    assert run.points[-2].seconds < 0.2


def test_the_state_of_adamw_is_two_numbers_a_parameter(digits: Splits) -> None:
    run = _run(digits, "adamw", 1e-3, epochs=0.1)
    assert run.state_bytes / run.parameters == pytest.approx(8, abs=0.01)


def test_state_bytes_counts_nested_tensors_and_shared_storage_once() -> None:
    shared = torch.zeros(10)
    assert state_bytes({"w": {"a": shared, "view": shared[:5], "list": [torch.zeros(3)], "step": 3}}) == 52


def test_evaluation_is_the_mean_over_samples_and_restores_training_mode(digits: Splits) -> None:
    model = PROBLEM.build(seed=0)
    samples = digits.test.slice(101)
    with torch.no_grad():
        expected = PROBLEM.loss(model(samples.inputs), samples.inputs, samples.targets).item()
    loss, accuracy = evaluate(PROBLEM, model, samples)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy is None
    assert model.training


def test_schedules() -> None:
    assert rate_factor("constant", 0.9) == 1
    assert rate_factor("linear", 0.25) == 0.75
    steps = [rate_factor("steps", spent) for spent in (0.0, 0.29, 0.31, 0.61, 0.91)]
    assert steps == pytest.approx([1, 1, 0.1, 0.01, 0.001])
    assert [rate_factor("cosine", spent) for spent in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    thirds = [rate_factor("thirds", spent) for spent in (0.0, 0.33, 0.34, 0.66, 0.67)]
    assert thirds == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_a_warm_up_rises_linearly_and_the_schedule_fills_the_rest() -> None:
    rising = [rate_factor("constant", spent, 0.2) for spent in (0.0, 0.1, 0.2, 0.9)]
    assert rising == pytest.approx([0.01, 0.505, 1, 1])
    assert [rate_factor("linear", spent, 0.2) for spent in (0.2, 0.6, 1.0)] == pytest.approx([1, 0.5, 0])
    assert rate_factor("cosine", 0.6, 0.2) == pytest.approx(0.5)
    assert rate_factor("steps", 0.31, 0.2) == pytest.approx(0.1)


def test_the_schedule_reaches_the_optimizer(digits: Splits) -> None:
    trainer = Trainer(replace(PROBLEM, schedule="linear"), digits, choose("sgd"), 0.01, 0)
    trainer.step(spent=0.75)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({}, "either seconds or epochs"),
        ({"seconds": 1, "epochs": 1}, "either seconds or epochs"),
        ({"seconds": 0}, "seconds must be above 0, got 0"),
        ({"epochs": -1}, "epochs must be above 0, got -1"),
        ({"epochs": math.nan}, "epochs must be above 0, got nan"),
    ],
)
def test_a_budget_is_one_positive_number(wrong: dict[str, float], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Budget(**wrong)


def test_the_test_figures_are_those_at_the_best_validation_accuracy(digits: Splits) -> None:
    problem = replace(PROBLEMS["cnn-digits"], evaluation_samples=400)
    splits = batches.load(problem, torch.device("cpu"))
    splits = replace(splits, validation=splits.train.slice(300))
    run = Run(problem.name, "adamw", 3e-2, 0)
    trainer = Trainer(problem, splits, choose("adamw"), 3e-2, 0)
    seen: list[float] = []

    def log(run: Run, point: Point) -> None:
        seen.append(evaluate(problem, trainer.model, splits.validation)[1])

    train(run, trainer, splits, Budget(epochs=2), points=8, log=log)
    best = run.points[seen.index(max(seen))]
    assert run.validation_accuracy == max(seen)
    assert (run.test_loss, run.test_accuracy) == (best.test_loss, best.test_accuracy)


def test_the_penalty_pulls_the_named_weight_to_zero(digits: Splits) -> None:
    free = Trainer(PROBLEM, digits, choose("sgd"), 1e-3, 0)
    pulled = Trainer(replace(PROBLEM, weight_penalty={"1.weight": 10.0}), digits, choose("sgd"), 1e-3, 0)
    start = PROBLEM.build(0).get_parameter("1.weight")
    for trainer in (free, pulled):
        trainer.step(spent=0.0)
    moved = pulled.model.get_parameter("1.weight") - free.model.get_parameter("1.weight")
    torch.testing.assert_close(moved, -1e-3 * 10.0 * start)
    for name in ("1.bias", "3.weight"):
        assert torch.equal(pulled.model.get_parameter(name), free.model.get_parameter(name))
