"""One training loop for every optimizer, with a clock that counts training only."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

import minifisher
from minifisher_lab.training import epoch_times, processes
from minifisher_lab.training.batches import batches
from minifisher_lab.training.runs import Point, Unresumable, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from minifisher_lab.problems import Problem
    from minifisher_lab.problems.problem import Schedule
    from minifisher_lab.training.checkpoint import Checkpoint
    from minifisher_lab.training.optimizers import Choice, Optimizer
    from minifisher_lab.training.runs import Run
    from minifisher_lab.training.samples import Samples, Splits

MOST_WARM_START_BATCHES = 572
"""Of the pass that begins a published run: an epoch of SVHN in batches of 128, the longest of the papers."""
FIRST_RATE = 0.01
"""The learning rate of a warm-up's first step, as a share of the full one: a step of 0 would be wasted."""


@dataclass(frozen=True)
class Budget:
    """When a run ends: after a number of training seconds or a number of epochs. Give one of the two."""

    seconds: float | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.epochs is None):
            both = "both" if self.seconds is not None else "neither"
            raise ValueError(f"give either seconds or epochs, not {both}")
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


def rate_factor(schedule: Schedule, spent: float, warm_up: float = 0.0) -> float:
    """The learning rate as a fraction of the full one, when a fraction `spent` of the budget is spent.

    During the first `warm_up` of the budget it rises linearly. Let r be the spent fraction of the rest.
    linear: 1 - r; cosine: (1 + cos(pi r)) / 2; steps: x 0.1 whenever 30 % of the whole budget are spent
    (every 60 of 200 epochs); thirds: x 0.1 after each third (every 50 of 150 epochs: MBF's authors for SVHN
    and CIFAR, who take steps for first-order methods).
    """
    if spent < warm_up:
        return FIRST_RATE + (1 - FIRST_RATE) * spent / warm_up
    rest = (spent - warm_up) / (1 - warm_up) if spent < 1 else 1.0
    factors = {
        "constant": 1.0,
        "linear": 1.0 - rest,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * rest)),
        "steps": 0.1 ** math.floor(spent / 0.3),
        "thirds": 0.1 ** math.floor(spent * 3),
    }
    return factors[schedule]


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
    loss, hits, size = 0.0, 0, problem.evaluation_samples
    for inputs, targets in zip(
        *(torch.split(part, size) for part in (samples.inputs, samples.targets)), strict=True
    ):
        outputs = model(inputs)
        loss += problem.loss(outputs, inputs, targets).item() * len(inputs)
        hits += int((outputs.argmax(-1) == targets).sum()) if problem.classifies else 0
    model.train()
    return loss / len(samples), 100 * hits / samples.targets.numel() if problem.classifies else None


class Trainer:
    """The network, the optimizer and the stream of batches of one run."""

    def __init__(self, problem: Problem, splits: Splits, choice: Choice, rate: float, seed: int) -> None:
        self.problem = problem
        self.device = splits.train.inputs.device
        self.model = problem.build(seed).to(self.device)
        splits.connect(self.model)
        self.optimizer: Optimizer = choice.build(self.model, lr=rate)
        self.rate = rate
        self.replica = processes.replicate(self.model, seed)
        size = min(problem.batch_size, len(splits.train))
        processes.check_shares(size)
        self.steps_per_epoch = len(splits.train) // size
        self.stream = batches(splits.train, size, seed, problem.augmentation)
        self._first_pass = batches(splits.train, size, seed + 1, problem.augmentation)
        self._warm_labels = choice.warm_labels
        self._skipped_before = 0

    def warm_start(self) -> None:
        """The pass through the data with which a published run begins; nothing for other optimizers."""
        if self._warm_labels is None:
            return
        assert isinstance(self.optimizer, minifisher.CurvatureOptimizer)
        count = min(self.steps_per_epoch, MOST_WARM_START_BATCHES)
        batch = (map(processes.share, pair) for pair in islice(self._first_pass, count))
        wanted = ((inputs, self.problem.wanted(inputs, targets)) for inputs, targets in batch)
        self.optimizer.warm_start(
            self.replica,
            wanted,
            lambda outputs, labels: self.problem.loss(outputs, outputs, labels),
            self.problem.likelihood,
            self._warm_labels,
        )

    def step(self, spent: float) -> float:
        """Take one step on the next batch, shared by all processes, and return the loss before the step."""
        inputs, targets = map(processes.share, next(self.stream))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_factor(self.problem.schedule, spent, self.problem.warm_up)

        def closure() -> Any:
            self.model.zero_grad()
            outputs = self.replica(inputs)
            if isinstance(self.optimizer, minifisher.CurvatureOptimizer):
                self.optimizer.observe(outputs, likelihood=self.problem.likelihood)
            loss = self.problem.loss(outputs, inputs, targets) + self.problem.penalty(self.model)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return processes.mean(float(self.optimizer.step(closure)))

    @property
    def skipped_steps(self) -> int:
        """The steps that the optimizer did not take, those before a checkpoint included."""
        return self._skipped_before + int(getattr(self.optimizer, "skipped_steps", 0))

    def state_dict(self) -> dict[str, Any]:
        """The network, the optimizer, the place in the stream, and torch's random generators."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
            "skipped_steps": self.skipped_steps,
            "generators": {kind: _random(kind).get_rng_state() for kind in ("cpu", self.device.type)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the trainer with this state stood."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(state["stream"])
        self._skipped_before += state["skipped_steps"] - self.skipped_steps
        for kind, generator in state["generators"].items():  # last: the rest may draw numbers
            _random(kind).set_rng_state(generator)


def _random(kind: str) -> Any:
    """torch's module for the random generator of a kind of device."""
    return torch.random if kind == "cpu" else torch.get_device_module(kind)


def warm_up(problem: Problem, splits: Splits, choice: Choice, steps: int = 3) -> None:
    """Take a few steps on a throwaway network, so that no run is charged for compilation or allocation."""
    trainer = Trainer(problem, splits, choice, choice.rate, seed=0)
    for _ in range(steps):
        trainer.step(spent=0.0)


class Measurement:
    """A run in progress: the trainer, the clock, and the losses since the last point."""

    def __init__(self, run: Run, trainer: Trainer, splits: Splits, budget: Budget) -> None:
        self.run, self.trainer, self.budget = run, trainer, budget
        size = trainer.problem.evaluation_samples
        self.slices = splits.train.slice(size), splits.test.slice(size)
        self.validation = splits.validation
        self.clock = Clock(trainer.device)
        self.losses: list[float] = []
        run.parameters = sum(weight.numel() for weight in trainer.model.parameters())

    @property
    def epoch(self) -> float:
        """The epochs so far."""
        return self.run.steps / self.trainer.steps_per_epoch

    def spent(self) -> float:
        """The spent fraction of the budget; under torchrun the first process's clock decides."""
        return processes.of_first(self.budget.spent(self.clock.seconds, self.epoch))

    def step(self, spent: float) -> None:
        """Take one step; the clock runs only here."""
        with self.clock:
            self.losses.append(self.trainer.step(spent))
        self.run.steps, self.run.seconds = self.run.steps + 1, self.clock.seconds

    def record(self) -> Point:
        """Evaluate and add a point to the run."""
        run, (train_slice, test_slice) = self.run, self.slices
        train_loss, _ = evaluate(self.trainer.problem, self.trainer.model, train_slice)
        test_loss, test_accuracy = evaluate(self.trainer.problem, self.trainer.model, test_slice)
        batch_loss = sum(self.losses) / len(self.losses) if self.losses else train_loss
        point = Point(run.steps, self.epoch, run.seconds, batch_loss, train_loss, test_loss, test_accuracy)
        self.losses.clear()
        run.points.append(point)
        self._select(point)
        return point

    def _select(self, point: Point) -> None:
        """Keep the test figures of the point with the best validation accuracy; the first of equal ones."""
        if self.validation is None:
            return
        _, accuracy = evaluate(self.trainer.problem, self.trainer.model, self.validation)
        best = self.run.validation_accuracy
        if accuracy is not None and (best is None or accuracy > best):
            self.run.validation_accuracy = accuracy
            self.run.test_loss, self.run.test_accuracy = point.test_loss, point.test_accuracy

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        self.run.skipped_steps = self.trainer.skipped_steps
        return {"run": asdict(self.run), "losses": list(self.losses), "trainer": self.trainer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run with this state stood."""
        self.run.restore(state["run"])
        self.losses[:] = state["losses"]
        self.clock.seconds = self.run.seconds
        self.trainer.load_state_dict(state["trainer"])


def train(
    run: Run,
    trainer: Trainer,
    splits: Splits,
    budget: Budget,
    *,
    points: int = 50,
    log: Callable[[Run, Point], None] = lambda run, point: None,
    watch: Callable[[float, float], None] = lambda spent, loss: None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train until the budget is spent or the loss is no longer finite, and record everything in `run`.

    `log` receives `points` evenly spaced points. `watch` receives the spent fraction and the batch loss a few
    times a second. The clock stops during both, during evaluation and while a checkpoint is written. If
    `checkpoint` has a file already, the run goes on from there.
    """
    measurement = Measurement(run, trainer, splits, budget)
    if not _resumed(measurement, checkpoint):
        trainer.warm_start()  # not timed, as in the published code
        log(run, measurement.record())
    spent, watched = measurement.spent(), 0.0
    while spent < 1 and processes.of_first(run.points[-1].finite):
        measurement.step(spent)
        spent = measurement.spent()
        logged = spent * points >= len(run.points) or spent == 1 or not math.isfinite(measurement.losses[-1])
        if logged:
            log(run, measurement.record())
        if checkpoint and checkpoint.due(logged=logged, ended=spent == 1 or not run.points[-1].finite):
            checkpoint.save(measurement.state_dict())
        if time.monotonic() - watched > 0.1:
            watched = time.monotonic()
            watch(spent, run.points[-1].batch_loss)
    _conclude(run, trainer, splits)


def _resumed(measurement: Measurement, checkpoint: Checkpoint | None) -> bool:
    state = checkpoint.load() if checkpoint else None
    if checkpoint and state:
        try:
            measurement.load_state_dict(state)
        except Exception as error:  # a file of another release, or one that somebody changed
            raise Unresumable(
                f"{checkpoint.folder.path / checkpoint.name} does not fit this run "
                f"({reason(error)}): delete it, and the run starts anew"
            ) from error
    return state is not None


def _conclude(run: Run, trainer: Trainer, splits: Splits) -> None:
    run.state_bytes = state_bytes(dict(trainer.optimizer.state))
    run.skipped_steps = trainer.skipped_steps
    if splits.validation is None:
        run.test_loss, run.test_accuracy = evaluate(trainer.problem, trainer.model, splits.test)
    if processes.rank() == 0:
        epoch_times.keep(run, trainer.steps_per_epoch)
    # The status is set last, because Ctrl-C may interrupt the evaluation.
    run.status = "finished" if run.points[-1].finite else "diverged"
