"""The record of a run: its logged points, its totals, and the folder that stores them as JSON.

Files are written whole or line by line, so that a process that is killed leaves nothing unreadable. A full
disk does not end a run: its points stay in memory, and every later write tries again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from itertools import count
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from minifisher_lab import files
from minifisher_lab.training import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

PLAN = "plan.json"
"""The file that says what a run folder measures."""

LONGEST_NAME = 240
"""Bytes of a run's name: with an ending it must fit into the 255 that file systems allow."""

Status = Literal["running", "finished", "diverged", "interrupted"]


@dataclass(frozen=True)
class Point:
    """One logged point. `seconds` counts training only, not evaluation."""

    step: int
    epoch: float
    seconds: float
    batch_loss: float
    """The mean of the mini-batch losses since the last point."""
    train_loss: float
    """The loss on the fixed slice of the training set. Runs are compared by it."""
    test_loss: float
    test_accuracy: float | None

    @classmethod
    def restored(cls, record: dict[str, Any]) -> Point:
        """The point with these fields; JSON has null for a loss that was not finite."""
        losses = {name: record[name] for name in ("batch_loss", "train_loss", "test_loss")}
        known = {name: math.nan if loss is None else loss for name, loss in losses.items()}
        return cls(**{**record, **known})

    @property
    def finite(self) -> bool:
        """Whether both training losses are finite, so that the run can go on."""
        return math.isfinite(self.batch_loss) and math.isfinite(self.train_loss)


@dataclass
class Run:
    """One optimizer with one learning rate and one seed, and what was measured so far."""

    problem: str
    optimizer: str
    rate: float
    seed: int
    status: Status = "running"
    steps: int = 0
    seconds: float = 0.0
    parameters: int = 0
    state_bytes: int = 0
    skipped_steps: int = 0
    test_loss: float | None = None
    test_accuracy: float | None = None
    points: list[Point] = field(default_factory=list)
    validation_accuracy: float | None = None
    """The best one, where there is a validation set; the test figures are those of the same point."""

    @property
    def name(self) -> str:
        """The run's name, usable as a file name. A hash replaces the end of a very long optimizer."""
        optimizer, numbers = _cleaned(self.optimizer), _cleaned(f"-lr{self.rate:g}-seed{self.seed}")
        if len(f"{optimizer}{numbers}".encode()) > LONGEST_NAME:
            kept = optimizer.encode()[: LONGEST_NAME // 2].decode(errors="ignore")
            optimizer = f"{kept}-{hashlib.sha256(self.optimizer.encode()).hexdigest()[:12]}"
        return f"{optimizer}{numbers}"

    @property
    def ended(self) -> bool:
        """Whether the run came to its end, so that no resumed command measures it again."""
        return self.status in ("finished", "diverged")

    def restore(self, record: dict[str, Any]) -> None:
        """Take over what was recorded of this run; ValueError if the record is of another run."""
        for name in ("problem", "optimizer", "rate", "seed"):
            if record[name] != getattr(self, name):
                raise ValueError(f"it holds a run with {name} {record[name]}, not {getattr(self, name)}")
        for name in {known.name for known in fields(self)} & record.keys():  # older files know fewer
            setattr(self, name, record[name])
        self.points = [Point.restored(point) for point in record["points"]]

    @property
    def best_loss(self) -> float:
        """The lowest loss on the fixed slice of the training set."""
        return self.best_of_first(len(self.points))

    def best_of_first(self, count: int) -> float:
        """The lowest loss at the first `count` points."""
        return min((point.train_loss for point in self.points[:count] if point.finite), default=math.inf)

    def seconds_to(self, loss: float) -> float | None:
        """The training seconds at the first point whose training loss is at or below `loss`."""
        return next((point.seconds for point in self.points if point.train_loss <= loss), None)


def _cleaned(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", text)


def without_infinities(value: Any) -> Any:
    """The same value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_infinities(entry) for entry in value]
    return value


def as_json(content: Any) -> bytes:
    """The content as the bytes of a JSON file."""
    return (json.dumps(without_infinities(content), indent=1) + "\n").encode()


def lines(points: Sequence[Point]) -> bytes:
    """The points as JSON, one a line."""
    return "".join(json.dumps(without_infinities(asdict(point))) + "\n" for point in points).encode()


class NotWritten(OSError):  # noqa: N818 - the name says what happened
    """Results could not be written; the message names the files and the reason."""


class Unresumable(ValueError):  # noqa: N818
    """A run folder that cannot go on; the message says why and what to do."""


Change: TypeAlias = "Callable[[Path], object]"
"""Writes or deletes the file at a path."""


class Unwritten(NamedTuple):
    """Why a file could not be written, and how to try again."""

    reason: str
    again: Change


@dataclass(frozen=True)
class RunFolder:
    """A folder for the plan, the results, and the points and the record of every run."""

    path: Path
    resumed: bool = False
    """Whether the folder is an earlier command's, whose runs go on."""
    request: dict[str, Any] = field(default_factory=dict)
    """The command and its options, for plan.json."""
    unwritten: dict[str, Unwritten] = field(default_factory=dict)
    """The files that could not be written."""
    logged: dict[str, int] = field(default_factory=dict)
    """How many points of each run this process has written."""
    locks: list[files.Lock | None] = field(default_factory=list)
    """What keeps other processes out."""

    @classmethod
    def create(cls, parent: Path, label: str, request: dict[str, Any] | None = None) -> RunFolder:
        """Create a new folder named by the time and the label; it never replaces an older one.

        Under torchrun only the first process creates the folder and writes into it.
        """
        stamp = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{label}"
        path = processes.read_by_first(lambda: _new(stamp))
        return cls._of_process(path, resumed=False, request=request or {})

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The folder of an earlier command. What a killed process left half written is deleted."""
        if not (path / PLAN).is_file():
            raise Unresumable(f"{path} is no run folder that can go on: it has no {PLAN}")
        folder = cls._of_process(path, resumed=True, request={})
        if processes.rank() == 0:
            files.remove_abandoned(path)
        return folder

    @classmethod
    def _of_process(cls, path: Path, resumed: bool, request: dict[str, Any]) -> RunFolder:
        return (Nowhere if processes.rank() > 0 else cls)(path, resumed, request)

    def begin(self, plan: dict[str, Any], device: torch.device) -> None:
        """Write what is about to be measured, or check that a resumed folder has the same plan.

        From here on no other process may begin in this folder: Unresumable if one has.
        """
        if not processes.read_by_first(self._locked):
            raise Unresumable(f"{self.path} is in use by another process: wait until it ends, or end it")
        if self.resumed:
            self._check(plan)
        else:
            about = {"device": str(device), "torch": torch.__version__, "started": f"{datetime.now():%F %T}"}
            try:
                self.write(PLAN, {**self.request, **plan, **about})
            except NotWritten as error:
                with suppress(OSError):
                    self.path.rmdir()  # nothing was measured
                raise NotWritten(f"{error}. {remedy(str(error))}, or choose another folder") from error

    def _locked(self) -> bool:
        self.locks.append(files.lock(self.path))
        return self.locks[-1] is not None

    def _check(self, plan: dict[str, Any]) -> None:
        stored, wanted = self.read(PLAN), json.loads(as_json(plan))
        other = [f"{name} {stored.get(name)}, not {value}" for name, value in wanted.items()
                 if stored.get(name) != value]  # fmt: skip
        if other:
            raise Unresumable(f"{self.path} was begun with {'; '.join(other)}: leave these options out")

    def read(self, name: str) -> Any:
        """A JSON file of the folder; Unresumable if it is damaged."""
        with self.readable(name) as content:
            return json.loads(content)

    @contextmanager
    def readable(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, for code that decodes them; whatever it raises becomes Unresumable."""
        path = self.path / name
        try:
            yield processes.read_by_first(path.read_bytes)
        except Exception as error:  # damaged files make decoders raise nearly everything
            cure = "" if name == PLAN else ": delete it, and what it holds is measured again"
            raise Unresumable(f"{path} cannot be read ({reason(error)}){cure}") from error

    def log(self, run: Run, point: Point) -> None:
        """Append the point to the run's file, or write the file anew if this process has not yet done so."""
        name, content = f"{run.name}.jsonl", lines([point])
        if self.logged.pop(run.name, None) == len(run.points) - 1:
            written = self._attempt(
                name, lambda path: _append(path, content), lambda path: _rewrite(path, run)
            )
        else:
            written = self._attempt(name, lambda path: _rewrite(path, run))
        if written:
            self.logged[run.name] = len(run.points)

    def record(self, run: Run) -> None:
        """Write a run that has ended, so that a resumed command does not measure it again."""
        self.keep(f"{run.name}.json", asdict(run))

    def recorded(self, run: Run) -> bool:
        """Whether an earlier command measured this run to its end; if so, `run` takes over the record."""
        name, path = f"{run.name}.json", self.path / f"{run.name}.jsonl"
        if not self.resumed or not processes.read_by_first((self.path / name).exists):
            return False
        with self.readable(name) as content:
            run.restore(json.loads(content))
        if not path.exists() or path.read_bytes() != lines(run.points):  # the disk was full
            self._attempt(path.name, lambda path: _rewrite(path, run))
        return True

    def write(self, name: str, content: dict[str, Any]) -> Path:
        """Write a JSON file into the folder; NotWritten if that fails."""
        path = self.path / name
        try:
            files.write(path, as_json(content))
        except OSError as error:
            raise NotWritten(f"cannot write {path}: {error.strerror or error}") from error
        self.unwritten.pop(name, None)
        return path

    def keep(self, name: str, content: Any) -> Path:
        """Write a JSON file into the folder; if that fails, the older one stays."""
        self._attempt(name, lambda path: files.write(path, as_json(content)))
        return self.path / name

    def save(self, name: str, content: memoryview) -> None:
        """Write a binary file into the folder; if that fails, the older one stays."""
        self._attempt(name, lambda path: files.write(path, content))

    def remove(self, name: str) -> None:
        """Delete a file that is no longer needed."""
        self._attempt(name, lambda path: path.unlink(missing_ok=True))

    def write_again(self) -> None:
        """Write what could not be written before; NotWritten if it still cannot be."""
        for name, failure in tuple(self.unwritten.items()):
            self._attempt(name, failure.again)
        if self.unwritten:
            reasons = "; ".join(f"{name}: {failure.reason}" for name, failure in self.unwritten.items())
            raise NotWritten(f"cannot write into {self.path}: {reasons}")

    def _attempt(self, name: str, change: Change, again: Change | None = None) -> bool:
        """Change a file. If that fails, say so once, and remember how to do it `again`."""
        try:
            change(self.path / name)
        except OSError as error:
            why = error.strerror or str(error)
            if not self.unwritten:
                _warn(f"cannot write {self.path / name}: {why}")
            self.unwritten[name] = Unwritten(why, again or change)
            return False
        self.unwritten.pop(name, None)
        return True


class Nowhere(RunFolder):
    """A run folder that writes nothing: for all torchrun processes but the first."""

    def _attempt(self, name: str, change: Change, again: Change | None = None) -> bool:
        return True

    def write(self, name: str, content: dict[str, Any]) -> Path:
        """Write nothing."""
        return self.path / name


def remedy(trouble: str) -> str:
    """What to do about a file that could not be written, by the reason that the system gave."""
    full = any(os.strerror(number) in trouble for number in (errno.ENOSPC, errno.EDQUOT))
    return "Free space" if full else "Make the folder writable"


def reason(error: Exception) -> str:
    """The exception in one short line."""
    return shorten(f"{type(error).__name__}: {error}", 200)


def _new(stamp: Path) -> Path:
    """Make the folder `stamp`, or `stamp`-2 and so on if another command was faster."""
    for number in count(1):
        path = stamp if number == 1 else stamp.with_name(f"{stamp.name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not os.path.lexists(path):  # it is the parent that exists and is no folder
                raise
    raise AssertionError("count() has no end")


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def _rewrite(path: Path, run: Run) -> None:
    files.write(path, lines(run.points))


def _warn(trouble: str) -> None:
    later = "What is measured stays in memory and is written as soon as that is possible."
    print(f"Warning: {trouble}. {later}", file=sys.stderr)
