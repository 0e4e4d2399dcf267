"""The optimizers of the suite, and the range in which each of their settings is tuned.

A range is (lowest, highest) and is searched on a logarithmic scale. It is where the search begins: when the
best value is the outermost one, the next trials go further out. An optimizer is one row of `entrants`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import minifisher
from minifisher_lab.training.published import PUBLISHED

if TYPE_CHECKING:
    from collections.abc import Mapping

Range = tuple[float, float]

# torch.optim's optimizers: the learning rate alone.
FIRST_ORDER_RATES: dict[str, Range] = {
    "sgd": (1e-4, 1e0),
    "adam": (1e-4, 1e-1),
    "adamw": (1e-4, 1e-1),
    "muon": (1e-4, 1e-1),
}
# minifisher's methods: the learning rate, which is in step lengths of Adam, and the damping. All dampings are
# relative to the mean curvature. A method without a row has the common range.
METHOD_RATES: Range = (3e-4, 3e-1)
COMMON_DAMPING: Range = (1e-3, 1e0)
DAMPINGS: dict[str, Range] = {
    "kbfgs": (1e-2, 1e1),
    "kbfgsl": (1e-2, 1e1),
    "shampoo": (1e-5, 1e-1),
    "soap": (1e-6, 1e-2),
}
# Around the published values: the methods with the settings of their authors.
FACTOR_AROUND_PUBLISHED = 100.0
DEFAULTS = {"mbf-default": "mbf"}
"""Names of optimizers that run with their default arguments, and what they are. They have no trials."""


@dataclass(frozen=True)
class Entrant:
    """An optimizer of the suite, and the ranges that are searched; without ranges it is not tuned."""

    name: str
    spec: str
    """What `minifisher train --optimizer` takes: mbf, or mbf:power=0.5."""
    space: Mapping[str, Range] = field(default_factory=dict)


def published() -> dict[str, Entrant]:
    """The methods as published for the autoencoder; of them only MBF is in the suite unless asked for."""

    def around(value: float) -> Range:
        return value / FACTOR_AROUND_PUBLISHED, value * FACTOR_AROUND_PUBLISHED

    rows = {name: row for name, row in PUBLISHED.items() if row.problem == "autoencoder"}
    damped = {
        name: {} if row.damping is None else {"damping": around(row.damping)} for name, row in rows.items()
    }
    return {name: Entrant(name, name, {"lr": around(row.rate), **damped[name]}) for name, row in rows.items()}


def entrants() -> dict[str, Entrant]:
    """Every optimizer of the suite by its name; `published` has more that can be asked for."""
    first_order = [Entrant(name, name, {"lr": rates}) for name, rates in FIRST_ORDER_RATES.items()]
    methods = [
        Entrant(name, name, {"lr": METHOD_RATES, "damping": DAMPINGS.get(name, COMMON_DAMPING)})
        for name in minifisher.METHODS
    ]
    untuned = [Entrant(name, spec) for name, spec in DEFAULTS.items()]
    as_published = published()["mbf-published"]
    return {entrant.name: entrant for entrant in (*untuned, *methods, as_published, *first_order)}
