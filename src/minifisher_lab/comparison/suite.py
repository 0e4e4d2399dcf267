"""What a suite measures: every optimizer tuned with equal trials, then its best setting over seeds."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from minifisher_lab.comparison.fit import fitted
from minifisher_lab.comparison.sizes import SCALES
from minifisher_lab.comparison.spaces import Entrant, entrants, published
from minifisher_lab.comparison.study import FILE_ERRORS, StudyError, StudyFile, Unit
from minifisher_lab.names import look_up
from minifisher_lab.problems import PROBLEMS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    import torch


@dataclass(frozen=True)
class SuitePlan:
    """What a study measures. The seeds of the best setting begin at 1; trials have seed 0."""

    epochs: Mapping[str, float]
    """The epochs of a run by problem."""
    entrants: tuple[Entrant, ...]
    trials: int
    seeds: int
    hours: float | None = None
    """How long the whole study may take; trials and epochs are reduced to fit."""
    points: int = 25

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SuitePlan:
        """The plan that `as_json` wrote."""
        parts = {**content, "entrants": tuple(Entrant(**entrant) for entrant in content["entrants"])}
        return cls(**parts)

    def as_json(self) -> Any:
        """The plan in lists, dictionaries, strings and numbers."""
        return json.loads(json.dumps(asdict(self)))

    @cached_property
    def by_name(self) -> dict[str, Entrant]:
        """The entrants by their names."""
        return {entrant.name: entrant for entrant in self.entrants}

    def trials_of(self, entrant: Entrant) -> int:
        """How many trials it has: none if it is not tuned."""
        return self.trials if entrant.space else 0

    def runs_of(self, entrant: Entrant) -> int:
        """How many runs it has on one problem."""
        return self.trials_of(entrant) + self.seeds

    @property
    def total(self) -> int:
        """All runs."""
        return len(self.epochs) * sum(map(self.runs_of, self.entrants))

    def units(self) -> Iterator[Unit]:
        """All runs in order.

        The optimizers take turns, so that a machine that becomes slower over time affects all alike.
        """
        for problem in self.epochs:
            for number in range(self.trials):
                tuned = [entrant for entrant in self.entrants if entrant.space]
                yield from (Unit(problem, entrant.name, "trial", number) for entrant in tuned)
            for number in range(self.seeds):
                turn = number % len(self.entrants)
                order = self.entrants[turn:] + self.entrants[:turn]
                yield from (Unit(problem, entrant.name, "seed", number) for entrant in order)

    def trial_units(self, unit: Unit) -> list[Unit]:
        """The trials that come before the unit: the earlier ones, or all for a seed."""
        count = unit.number if unit.kind == "trial" else self.trials_of(self.by_name[unit.entrant])
        return [replace(unit, kind="trial", number=number) for number in range(count)]


def make_plan(
    scale: str,
    problems: Sequence[str] | None = None,
    optimizers: Sequence[str] | None = None,
    *,
    epochs: float | None = None,
    **changes: float | None,
) -> SuitePlan:
    """The plan of a scale, with the given problems, optimizers, epochs, and changes that are not None."""
    _check_numbers({"epochs": epochs, "budget": changes.get("hours")})
    sizes, usual = SCALES[scale], entrants()
    known = published() | usual
    names = [look_up("problem", name, PROBLEMS).name for name in problems or sizes.problems]
    chosen = tuple(look_up("optimizer of the suite", name, known) for name in optimizers or usual)
    own = {name: sizes.epochs.get(name, PROBLEMS[name].epochs) for name in names}
    lengths = own if epochs is None else dict.fromkeys(names, epochs)
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    return replace(SuitePlan(lengths, chosen, sizes.trials, sizes.seeds), **given)


def _check_numbers(numbers: Mapping[str, float | None]) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be a finite number above 0, got {value:g}")


def open_study(path: Path, requested: SuitePlan, device: torch.device) -> tuple[StudyFile, SuitePlan]:
    """Make the study, or open the one that was made with the same plan."""
    if path.exists():
        study = StudyFile(path)
    else:
        planned = fitted(requested, device)
        pairs = [f"{problem}/{entrant.name}" for problem in planned.epochs for entrant in planned.entrants]
        try:
            study = StudyFile.create(path, requested.as_json(), planned.as_json(), pairs)
        except OSError as error:  # no such folder can be made, or the file system has no hard links
            raise StudyError(f"cannot make {path} ({error.strerror}): name another with --study") from error
        except FILE_ERRORS as error:  # the disk is full
            raise StudyError(f"cannot make {path} ({error}): name another with --study") from error
    _check_same(path, requested.as_json(), study.requested)
    return study, SuitePlan.from_json(study.planned)


def _check_same(path: Path, asked: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    for name, value in asked.items():
        if made[name] != value:
            raise StudyError(
                f"{path} was made with {name} = {_short(made[name])}, and this command asks for "
                f"{_short(value)}: repeat the first command to continue, or name another file with --study"
            )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(entry["name"] for entry in value) + " and their ranges"
    return str(value)
