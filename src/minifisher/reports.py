"""What an optimizer tells of its choices, and of what went wrong."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from minifisher.description import Description, describe_layer
from minifisher.guard import FALLEN, HELD, SKIPPED, counts, warn_if
from minifisher.resumable import Resumable

if TYPE_CHECKING:
    from minifisher.cohort import Move
    from minifisher.statistics.layers import Layer


class Reports(Resumable):
    """The part of CurvatureOptimizer that people read."""

    _skipped: Any  # an int, or with `capturable` a tensor []
    _fallbacks: Any  # likewise
    _held: int

    @abstractmethod
    def _entry(self, layer: Layer) -> dict[str, Any]:
        """What the state holds of a layer; nothing before the first step."""

    @property
    def skipped_steps(self) -> int:
        """Steps that were not taken because a gradient was NaN or infinite."""
        return int(self._skipped)

    def _skip(self) -> None:
        warn_if(not self._skipped, SKIPPED)
        self._skipped += 1

    def _report(self, move: Move) -> None:
        warn_if(move.fallen > 0 and not self._fallbacks, FALLEN)
        warn_if(move.held > 0 and not self._held, HELD)
        self._fallbacks += move.fallen
        self._held += move.held

    def describe(self) -> Description:
        """What was chosen for every weight and why, and the share of the parameters each structure covers."""
        rows = (
            describe_layer(layer, self._plans[layer], group["fisher"])
            for layer, group in self._layers.items()
        )
        return Description(type(self).__name__, tuple(rows))

    def diagnostics(self) -> dict[str, Any]:
        """Counts of what went wrong; for every weight its steps, observations and its curvature's counts."""
        weights = {layer.name: counts(self._entry(layer)) for layer in self._layers}
        went_wrong = {"fallbacks": int(self._fallbacks), "held_layers": self._held}
        return {"skipped_steps": self.skipped_steps, **went_wrong, "weights": weights}
