"""The optimizers and learning rates that a command line asks for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minifisher_lab.comparison.compare import Candidate
from minifisher_lab.names import UnknownNameError, look_up
from minifisher_lab.training.optimizers import choose, split_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from minifisher_lab.training.optimizers import Choice


def candidates(names: str, tune: bool, rates: Iterable[str]) -> tuple[Candidate, ...]:
    """Every optimizer with its learning rates: the given ones, else its grid if `tune`, else its default."""
    choices = {choice.name: choice for choice in map(choose, split_names(names))}
    given = _given(rates, choices)
    return tuple(
        Candidate(choice, rate)
        for name, choice in choices.items()
        for rate in given.get(name, choice.grid if tune else (choice.rate,))
    )


def _given(texts: Iterable[str], choices: dict[str, Choice]) -> dict[str, tuple[float, ...]]:
    """The given rates of each optimizer.

    Rates that print alike count once, because tables and files name a run by its printed rate.
    """
    printed: dict[str, dict[str, float]] = {}
    for name, rates in (_rates(text, choices) for text in texts):
        for rate in rates:
            printed.setdefault(name, {}).setdefault(f"{rate:g}", rate)
    return {name: tuple(rates.values()) for name, rates in printed.items()}


def _rates(text: str, choices: dict[str, Choice]) -> tuple[str, tuple[float, ...]]:
    name, _, numbers = text.rpartition("=")
    try:
        rates = tuple(map(float, numbers.split(",")))
    except ValueError:
        rates = ()
    if not (name and rates and all(0 < rate < math.inf for rate in rates)):
        message = f"{text!r} is not NAME=RATE,... with finite rates above 0, as in adamw=1e-3,3e-3"
        raise UnknownNameError(message)
    look_up("optimizer among those compared", name, choices)
    return name, rates
