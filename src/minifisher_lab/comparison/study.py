"""A study in one SQLite file: Optuna's tables for the finished runs, and three tables beside them.

A finished run is a trial of the Optuna study "PROBLEM/OPTIMIZER"; Optuna's own tools can read them. Beside
them stand `plan` (one row: what the study measures), `claim` (who measures which run now) and `point` (the
curves). A kill at any moment leaves the file valid: it comes into being complete, under its final name, and
every later change is one transaction.
"""

from __future__ import annotations

import glob
import json
import math
import os
import platform
import sqlite3
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
import sqlalchemy.exc

from minifisher_lab.comparison import machine
from minifisher_lab.training.runs import Point, Run, reason, without_infinities

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from minifisher_lab.comparison.spaces import Range

TABLES = """
CREATE TABLE plan (requested TEXT NOT NULL, planned TEXT NOT NULL);
CREATE TABLE claim (unit TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, started REAL NOT NULL);
CREATE TABLE point (
    unit TEXT NOT NULL, step INTEGER NOT NULL, epoch REAL, seconds REAL, batch_loss REAL, train_loss REAL,
    test_loss REAL, test_accuracy REAL, PRIMARY KEY (unit, step)
);
"""
WAIT = 60.0
"""Seconds to wait while another process writes."""
SAME_START = 2.0
"""The start of a process is known to about a hundredth of a second, and moves when the clock is set."""


FILE_ERRORS = (sqlite3.Error, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
"""What reading and writing the file can raise besides OSError."""


@dataclass(frozen=True)
class Unit:
    """One run of a study: a trial of the search, or one seed of the best setting."""

    problem: str
    entrant: str
    kind: Literal["trial", "seed"]
    number: int

    @property
    def pair(self) -> str:
        """The name of its Optuna study."""
        return f"{self.problem}/{self.entrant}"

    @property
    def key(self) -> str:
        """Its name in the tables."""
        return f"{self.pair}/{self.kind}/{self.number}"


@dataclass(frozen=True)
class Record:
    """A finished run: its setting, what was measured, and under which circumstances."""

    unit: Unit
    setting: dict[str, float]
    run: Run
    """Its points are read apart, with `StudyFile.points`."""
    best_loss: float
    """The best training loss."""
    began: str
    ended: str
    machine: dict[str, Any] = field(default_factory=dict)
    neighbours: int = 0
    """How many other runs of the study were on the machine at the same time, at most."""
    load: float = 0.0
    """The highest load average during the run."""
    error: str | None = None
    """The exception that ended the run."""

    @property
    def status(self) -> str:
        """finished, diverged or failed."""
        return "failed" if self.error else self.run.status

    @property
    def loss(self) -> float:
        """What the search minimises: the best training loss, infinite unless the run finished."""
        return self.best_loss if self.status == "finished" else math.inf

    @property
    def shared(self) -> bool:
        """Whether the machine was shared while the run was timed."""
        return self.neighbours > 0 or machine.is_busy(self.load)

    @property
    def wall_seconds(self) -> float:
        """All seconds that the run took, evaluation included."""
        began, ended = (datetime.fromisoformat(text) for text in (self.began, self.ended))
        return (ended - began).total_seconds()


class StudyError(ValueError):
    """The file cannot be used as asked; the message says what to do."""


def now() -> str:
    """The time in UTC."""
    return datetime.now(timezone.utc).isoformat()


class StudyFile:
    """An open study. Several processes may have it open at the same time."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StudyError(f"there is no study {path}: make one with minifisher suite --study {path}")
        self.path = path
        try:
            with self._transaction("DEFERRED") as connection:
                row = connection.execute("SELECT requested, planned FROM plan").fetchone()
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{path} is no study of minifisher ({error}): name another file") from error
        with self._readable():
            self.requested, self.planned = map(json.loads, row)
            self._storage = _storage(path)
        self._studies: dict[str, optuna.Study] = {}
        self._records: dict[str, dict[str, Record]] = {}

    @classmethod
    def create(cls, path: Path, requested: object, planned: object, pairs: Iterable[str]) -> StudyFile:
        """Create the file, or open it if another process was faster.

        The tables are made in a file of this process's own, which then gets the final name.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.touch()  # OSError says what is wrong; SQLite does not
        storage = _storage(part)
        for pair in pairs:
            optuna.create_study(storage=storage, study_name=pair, direction="minimize")
        storage.engine.dispose()
        with _connected(part) as connection:
            connection.executescript(TABLES)
            row = json.dumps(requested), json.dumps(planned)
            connection.execute("INSERT INTO plan VALUES (?, ?)", row)
        try:
            os.link(part, path)  # fails if the name exists; a rename would replace the other's file
        except FileExistsError:
            pass
        finally:
            part.unlink()
        return cls(path)

    # ---- finished runs ----

    def records(self, pair: str, complete: int | None = None) -> dict[str, Record]:
        """The finished runs of a problem and an optimizer, without points, by the key of their unit.

        A pair that has `complete` runs is not read again.
        """
        known = self._records.setdefault(pair, {})
        if complete is None or len(known) < complete:
            with self._readable():
                found = [_record(trial) for trial in self._study(pair).get_trials(deepcopy=False)]
            for record in found:
                known.setdefault(record.unit.key, record)
        return known

    def points(self, unit: Unit) -> list[Point]:
        """The curve of a run."""
        names = [column.name for column in fields(Point)]
        query = f"SELECT {', '.join(names)} FROM point WHERE unit = ? ORDER BY step"
        with self._readable(), self._transaction("DEFERRED") as connection:
            rows = connection.execute(query, (unit.key,)).fetchall()
            return [_point(dict(zip(names, row, strict=True))) for row in rows]

    def finish(self, record: Record, space: Mapping[str, Range]) -> None:
        """Store a run. It is finished from the moment that its trial is stored, after its points."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM point WHERE unit = ?", (record.unit.key,))
            rows = [(record.unit.key, *asdict(point).values()) for point in record.run.points]
            connection.executemany(f"INSERT INTO point VALUES ({', '.join('?' * 8)})", rows)
        self._study(record.unit.pair).add_trial(_trial(record, space))
        self._records.setdefault(record.unit.pair, {})[record.unit.key] = record

    # ---- claims ----

    def claim(self, unit: Unit, *, take_over: bool = False) -> bool:
        """Reserve a run for this process, unless a living process has it or it is finished.

        Whether a process on another machine lives cannot be known; `take_over` says that it does not.
        """
        with self._transaction() as connection:
            owners = connection.execute("SELECT host, pid, started FROM claim WHERE unit = ?", (unit.key,))
            if any(_alive(host, pid, began, take_over) for host, pid, began in owners):
                return False
            mine = unit.key, platform.node(), os.getpid(), machine.started(os.getpid())
            connection.execute("INSERT OR REPLACE INTO claim VALUES (?, ?, ?, ?)", mine)
        if unit.key not in self.records(unit.pair):
            return True
        self.release(unit)  # it was finished between the caller's look and the claim
        return False

    def release(self, unit: Unit) -> None:
        """Give up this process's claim."""
        with self._transaction() as connection:
            mine = unit.key, platform.node(), os.getpid()
            connection.execute("DELETE FROM claim WHERE unit = ? AND host = ? AND pid = ?", mine)

    def others(self) -> list[tuple[str, str, int]]:
        """The runs that other living processes measure now: unit, machine, process."""
        with self._transaction("DEFERRED") as connection:
            rows = connection.execute("SELECT unit, host, pid, started FROM claim").fetchall()
        me = platform.node(), os.getpid()
        return [
            (unit, host, pid)
            for unit, host, pid, began in rows
            if (host, pid) != me and _alive(host, pid, began, take_over=False)
        ]

    # ---- the file ----

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn whatever the reading of a damaged file raises into a StudyError."""
        try:
            yield
        except Exception as error:  # sqlite3, SQLAlchemy, Optuna and json raise exceptions of their own
            raise StudyError(
                f"{self.path} is damaged or in use ({reason(error)}): name another file"
            ) from error

    def _study(self, pair: str) -> optuna.Study:
        if pair not in self._studies:
            self._studies[pair] = optuna.load_study(study_name=pair, storage=self._storage)
        return self._studies[pair]

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        with _connected(self.path) as connection:
            connection.execute(f"BEGIN {kind}")
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def _storage(path: Path) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A path in the URL would need quotes, which SQLAlchemy 2.0 and 2.1 read differently.
    options = {"creator": partial(sqlite3.connect, path, timeout=WAIT, check_same_thread=False)}
    return optuna.storages.RDBStorage("sqlite:///study", engine_kwargs=options)


def _remove_abandoned(path: Path) -> None:
    """Remove the files of processes that were killed while they made the study."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part*"):
        if machine.started(int(part.name.split(".")[-2])) is None:
            part.unlink(missing_ok=True)


def _alive(host: str, pid: int, began: float, take_over: bool) -> bool:
    if host != platform.node():
        return not take_over
    start = machine.started(pid)
    return start is not None and abs(start - began) < SAME_START


# ---- a run as a trial ----

CIRCUMSTANCES = ("began", "ended", "machine", "neighbours", "load", "error")


def _trial(record: Record, space: Mapping[str, Range]) -> optuna.trial.FrozenTrial:
    failed = record.error is not None
    run = {key: value for key, value in asdict(record.run).items() if key != "points"}
    return optuna.trial.FrozenTrial(
        number=-1,  # Optuna numbers it
        trial_id=-1,
        state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
        value=None if failed else record.loss,
        datetime_start=datetime.fromisoformat(record.began),
        datetime_complete=datetime.fromisoformat(record.ended),
        params=record.setting,
        distributions={name: _range(value, space.get(name)) for name, value in record.setting.items()},
        user_attrs={
            "unit": asdict(record.unit),
            "run": without_infinities(run),
            "best_loss": without_infinities(record.best_loss),
            **{name: getattr(record, name) for name in CIRCUMSTANCES},
        },
        system_attrs={},
        intermediate_values={},
    )


def _range(value: float, ends: Range | None) -> optuna.distributions.FloatDistribution:
    """The range, extended to the value if that lies outside."""
    low, high = ends or (value, value)
    return optuna.distributions.FloatDistribution(min(low, value), max(high, value), log=True)


def _record(trial: optuna.trial.FrozenTrial) -> Record:
    kept = trial.user_attrs
    best_loss = math.inf if kept["best_loss"] is None else kept["best_loss"]
    circumstances = {name: kept[name] for name in CIRCUMSTANCES}
    return Record(Unit(**kept["unit"]), dict(trial.params), Run(**kept["run"]), best_loss, **circumstances)


def _point(row: dict[str, Any]) -> Point:
    """SQLite stores NaN as NULL; only the accuracy may be missing."""
    losses = {name: math.nan for name, value in row.items() if value is None and name != "test_accuracy"}
    return Point(**{**row, **losses})
