"""Checkpoints: a run that goes on gives the weights and points of one that was never stopped."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.checkpoint import Checkpoint
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.runs import PLAN, Point, Run, RunFolder, Unresumable
from minifisher_lab.training.train import Budget, Trainer, train

if TYPE_CHECKING:
    from minifisher_lab.problems import Problem
    from minifisher_lab.training.batches import Splits

ROOT = Path(__file__).parents[3]
DIGITS, CNN = PROBLEMS["autoencoder-digits"], PROBLEMS["cnn-digits"]


class StoppedError(Exception):
    """Ends a run from within its log, as a kill would."""


def _folder(path: Path) -> RunFolder:
    (path / PLAN).write_text("{}")
    return RunFolder.reopen(path)


def _trained(
    problem: Problem, splits: Splits, optimizer: str, path: Path, *, every: int | None = None, stop: int = 99
) -> tuple[Run, Trainer]:
    """Train for 1.3 epochs, as far as the point number `stop`, after which the process is gone."""
    choice = choose(optimizer)
    run, trainer = (
        Run(problem.name, optimizer, choice.rate, 3),
        Trainer(problem, splits, choice, choice.rate, 3),
    )

    def log(run: Run, point: Point) -> None:
        if len(run.points) == stop:
            raise StoppedError

    checkpoint = Checkpoint(_folder(path), run, every)
    train(run, trainer, splits, Budget(epochs=1.3), points=6, log=log, checkpoint=checkpoint)
    return run, trainer


def _same(one: Run, other: Run) -> bool:
    timeless = [[replace(point, seconds=0) for point in run.points] for run in (one, other)]
    return timeless[0] == timeless[1] and replace(one, seconds=0, points=[]) == replace(
        other, seconds=0, points=[]
    )


@pytest.mark.parametrize(
    ("optimizer", "every"),
    [("adamw", None), ("muon", 1), ("mbf", None), ("mbf:fisher=sampled", 5), ("kbfgs", None), ("kfac", 4)],
)
def test_a_run_that_was_stopped_twice_ends_like_one_that_was_not(
    optimizer: str, every: int | None, digits: Splits, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("whole", "cut")]
    for folder in folders:
        folder.mkdir()
    run, trainer = _trained(DIGITS, digits, optimizer, folders[0], every=every)
    for stop in (3, 5):
        with pytest.raises(StoppedError):
            _trained(DIGITS, digits, optimizer, folders[1], every=every, stop=stop)
        torch.rand(5)  # another process has drawn other numbers
    again, resumed = _trained(DIGITS, digits, optimizer, folders[1], every=every)
    assert _same(run, again)
    assert again.seconds == again.points[-1].seconds > again.points[2].seconds
    for one, other in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "mbf"])
def test_batch_norm_augmentation_and_schedule_go_on_too(optimizer: str, tmp_path: Path) -> None:
    problem = replace(CNN, augmentation="crop and flip", schedule="linear")
    splits = batches.load(problem, torch.device("cpu"))
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run, trainer = _trained(problem, splits, optimizer, tmp_path / "whole")
    with pytest.raises(StoppedError):
        _trained(problem, splits, optimizer, tmp_path / "cut", stop=4)
    again, resumed = _trained(problem, splits, optimizer, tmp_path / "cut")
    assert _same(run, again)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert (
        trainer.optimizer.param_groups[0]["lr"]
        == resumed.optimizer.param_groups[0]["lr"]
        < choose(optimizer).rate
    )


def test_a_checkpoint_changes_nothing(digits: Splits, tmp_path: Path) -> None:
    run, trainer = _trained(DIGITS, digits, "mbf:fisher=sampled", tmp_path, every=1)
    choice = choose("mbf:fisher=sampled")
    plain, alone = (
        Run(DIGITS.name, run.optimizer, choice.rate, 3),
        Trainer(DIGITS, digits, choice, choice.rate, 3),
    )
    train(plain, alone, digits, Budget(epochs=1.3), points=6)
    assert _same(run, plain)
    assert all(map(torch.equal, trainer.model.parameters(), alone.model.parameters()))


def test_a_new_folder_ignores_files_of_others(digits: Splits, tmp_path: Path) -> None:
    _trained(DIGITS, digits, "sgd", tmp_path)
    run = Run(DIGITS.name, "sgd", choose("sgd").rate, 3)
    assert Checkpoint(RunFolder(tmp_path), run).load() is None
    assert not RunFolder(tmp_path).recorded(run)


@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", "cut", "list", "format", "other run", "other network"]
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    content: bytes | str, digits: Splits, tmp_path: Path
) -> None:
    _trained(DIGITS, digits, "sgd", tmp_path)
    (path,) = tmp_path.glob("*.pt")
    saved = torch.load(path)
    state = saved["processes"][0]
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-5000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        state["run"]["rate"] = 7.0 if content == "other run" else state["run"]["rate"]
        if content == "other network":
            state["trainer"]["model"].popitem()
        torch.save({"list": [1], "format": {**saved, "format": 2}}.get(content, saved), path)
    with pytest.raises(
        Unresumable, match=r"sgd-lr0\.001-seed3\.pt (cannot be read|does not fit).*: delete it"
    ):
        _trained(DIGITS, digits, "sgd", tmp_path)


def test_a_checkpoint_of_two_processes_needs_two(digits: Splits, tmp_path: Path) -> None:
    _trained(DIGITS, digits, "sgd", tmp_path)
    (path,) = tmp_path.glob("*.pt")
    saved = torch.load(path)
    torch.save({**saved, "processes": saved["processes"] * 2}, path)
    with pytest.raises(Unresumable, match="was written by 2 processes, not by 1: start as many"):
        _trained(DIGITS, digits, "sgd", tmp_path)


def test_skipped_steps_before_and_after_a_checkpoint_count(digits: Splits) -> None:
    trainers = [Trainer(DIGITS, digits, choose("mbf"), 1e-3, 0) for _ in range(2)]
    for trainer in trainers:
        for weight in trainer.model.parameters():
            weight.grad = torch.full_like(weight, torch.nan)
        trainer.optimizer.step()
    trainers[1].load_state_dict(trainers[0].state_dict())
    assert [trainer.skipped_steps for trainer in trainers] == [1, 1]


def test_killed_commands_end_like_one_that_was_not_killed(tmp_path: Path) -> None:
    """A few kills; `python benchmarks/kills.py` does a hundred of each command."""
    spec = importlib.util.spec_from_file_location("kills", ROOT / "benchmarks" / "kills.py")
    assert spec
    assert spec.loader
    kills = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kills)
    assert kills.examine("train", 4, tmp_path, random.Random(1)).startswith("4 kills, ")
