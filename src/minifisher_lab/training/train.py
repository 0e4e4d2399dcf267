"""One training loop for every optimizer, with a clock that counts training only."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import minifisher
from minifisher_lab.training import processes
from minifisher_lab.training.batches import batches
from minifisher_lab.training.runs import Point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from minifisher_lab.problems import Problem
    from minifisher_lab.problems.problem import Schedule
    from minifisher_lab.training.batches import Samples, Splits
    from minifisher_lab.training.optimizers import Choice, Optimizer
    from minifisher_lab.training.runs import Run

EVALUATION_SIZE = 2000
"""The size of the fixed training slice that runs are compared on, and of the test slice used during a run."""


@dataclass(frozen=True)
class Budget:
    """When a run ends: after a number of training seconds or a number of epochs. Give one of the two."""

    seconds: float | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.epochs is None):
            raise ValueError(f"give either seconds or epochs, got {self.seconds=} and {self.epochs=}")
        for name, value in (("seconds", self.seconds), ("epochs", self.epochs)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value:g}")

    def spent(self, seconds: float, epochs: float) -> float:
        """The fraction of the budget that is spent, 1 at the end."""
        if self.seconds is not None:
            return min(1.0, seconds / self.seconds)
        assert self.epochs is not None
        return min(1.0, epochs / self.epochs)

    def __str__(self) -> str:
        return f"{self.seconds:g} s" if self.seconds is not None else f"{self.epochs:g} epochs"


class Clock:
    """A stopwatch, used as `with clock:`. On an accelerator it waits until the queued work is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, *_: object) -> None:
        self.seconds += self._now() - self._started

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def rate_factor(schedule: Schedule, spent: float) -> float:
    """The learning rate as a fraction of the initial one, when a fraction `spent` of the budget is spent.

    linear: 1 - spent; steps: x 0.1 after 30, 60 and 90 % (every 60 of 200 epochs: Ren, Goldfarb 2021).
    """
    if schedule == "constant":
        return 1.0
    return 1.0 - spent if schedule == "linear" else 0.1 ** math.floor(spent / 0.3)


def state_bytes(state: Any) -> int:
    """The bytes of all tensors in an optimizer's state; shared storage counts once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages(state)}.values())


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage()
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _storages(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _storages(entry)


@torch.no_grad()
def evaluate(problem: Problem, model: nn.Module, samples: Samples) -> tuple[float, float | None]:
    """The mean loss and, for a classifier, the accuracy in per cent, in evaluation mode."""
    model.eval()
    loss, hits = 0.0, 0
    for inputs, targets in zip(
        *(torch.split(part, EVALUATION_SIZE) for part in (samples.inputs, samples.targets)), strict=True
    ):
        outputs = model(inputs)
        loss += problem.loss(outputs, inputs, targets).item() * len(inputs)
        hits += int((outputs.argmax(1) == targets).sum()) if problem.classifies else 0
    model.train()
    return loss / len(samples), 100 * hits / len(samples) if problem.classifies else None


class Trainer:
    """The network, the optimizer and the stream of batches of one run."""

    def __init__(self, problem: Problem, splits: Splits, choice: Choice, rate: float, seed: int) -> None:
        self.problem = problem
        self.device = splits.train.inputs.device
        self.model = problem.build(seed).to(self.device)
        self.optimizer: Optimizer = choice.build(self.model, lr=rate)
        self.rate = rate
        self.replica = processes.replicate(self.model, seed)
        size = min(problem.batch_size, len(splits.train))
        processes.check_shares(size)
        self.steps_per_epoch = len(splits.train) // size
        self.stream = batches(splits.train, size, seed, problem.augmentation)

    def step(self, spent: float) -> float:
        """Take one step on the next batch, shared by all processes, and return the loss before the step."""
        inputs, targets = map(processes.share, next(self.stream))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_factor(self.problem.schedule, spent)

        def closure() -> Any:
            self.model.zero_grad()
            outputs = self.replica(inputs)
            if isinstance(self.optimizer, minifisher.CurvatureOptimizer):
                self.optimizer.observe(outputs, likelihood=self.problem.likelihood)
            loss = self.problem.loss(outputs, inputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return processes.mean(float(self.optimizer.step(closure)))


def warm_up(problem: Problem, splits: Splits, choice: Choice, steps: int = 3) -> None:
    """Take a few steps on a throwaway network, so that no run is charged for compilation or allocation."""
    trainer = Trainer(problem, splits, choice, choice.rate, seed=0)
    for _ in range(steps):
        trainer.step(spent=0.0)


def train(
    run: Run,
    trainer: Trainer,
    splits: Splits,
    budget: Budget,
    *,
    points: int = 50,
    log: Callable[[Run, Point], None] = lambda run, point: None,
    watch: Callable[[float, float], None] = lambda spent, loss: None,
) -> None:
    """Train until the budget is spent or the loss is no longer finite, and record everything in `run`.

    `log` receives `points` evenly spaced points. `watch` receives the spent fraction and the batch loss a few
    times a second. The clock stops during both and during evaluation. Under torchrun the first process's
    clock decides.
    """
    slices = splits.train.slice(EVALUATION_SIZE), splits.test.slice(EVALUATION_SIZE)
    clock = Clock(trainer.device)
    run.parameters = sum(weight.numel() for weight in trainer.model.parameters())
    losses: list[float] = []
    spent, watched = 0.0, 0.0

    def record() -> None:
        train_loss, _ = evaluate(trainer.problem, trainer.model, slices[0])
        test_loss, test_accuracy = evaluate(trainer.problem, trainer.model, slices[1])
        batch_loss = sum(losses) / len(losses) if losses else train_loss
        epoch = run.steps / trainer.steps_per_epoch
        point = Point(run.steps, epoch, run.seconds, batch_loss, train_loss, test_loss, test_accuracy)
        losses.clear()
        run.points.append(point)
        log(run, point)

    record()
    while spent < 1 and processes.of_first(run.points[-1].finite):
        with clock:
            losses.append(trainer.step(spent))
        run.steps, run.seconds = run.steps + 1, clock.seconds
        spent = processes.of_first(budget.spent(clock.seconds, run.steps / trainer.steps_per_epoch))
        if spent * points >= len(run.points) or spent == 1 or not math.isfinite(losses[-1]):
            record()
        if time.monotonic() - watched > 0.1:
            watched = time.monotonic()
            watch(spent, run.points[-1].batch_loss)
    _conclude(run, trainer, splits)


def _conclude(run: Run, trainer: Trainer, splits: Splits) -> None:
    run.state_bytes = state_bytes(dict(trainer.optimizer.state))
    run.skipped_steps = int(getattr(trainer.optimizer, "skipped_steps", 0))
    run.test_loss, run.test_accuracy = evaluate(trainer.problem, trainer.model, splits.test)
    # The status is set last, because Ctrl-C may interrupt the evaluation.
    run.status = "finished" if run.points[-1].finite else "diverged"
