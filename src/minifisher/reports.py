"""What an optimizer tells of its choices, and of what went wrong."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any

from minifisher.guard import counts
from minifisher.resumable import Resumable
from minifisher.state.report import Description, describe_layer

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        self._skipped += 1
        if self._skipped == 1:
            warnings.warn(
                "a gradient was NaN or infinite: the step was skipped, weights and curvature are as before; "
                "optimizer.skipped_steps counts on, this warning is not repeated",
                RuntimeWarning,
                stacklevel=3,
            )

    def _report(self, fallen: int, held: int) -> None:
        if fallen and not self._fallbacks:
            warnings.warn(
                "the direction of a layer was not finite: it took the first-order step; raise the damping. "
                'optimizer.diagnostics()["fallbacks"] counts on, this warning is not repeated',
                RuntimeWarning,
                stacklevel=4,
            )
        if held and not self._held:
            warnings.warn(
                "neither the direction of a layer nor its first-order step was finite: it stayed where it "
                "was and its momentum starts anew; look for weights, or a weight_decay, out of range. "
                'optimizer.diagnostics()["held_layers"] counts on, this warning is not repeated',
                RuntimeWarning,
                stacklevel=4,
            )
        self._fallbacks += fallen
        self._held += held

    def describe(self) -> Description:
        """What was chosen for every weight and why, and the share of the parameters each structure covers."""
        rows = (
            describe_layer(layer, self._plans[layer], group["fisher"])
            for layer, group in self._layers.items()
        )
        return Description(type(self).__name__, tuple(rows))

    def _by_name(self) -> Iterator[tuple[str, Layer]]:
        """With its group, where two modules have layers of one name."""
        times = Counter(layer.name for layer in self._layers)
        indices = {id(group): index for index, group in enumerate(self.param_groups)}
        for layer, group in self._layers.items():
            place = f" of group {indices[id(group)]}" if times[layer.name] > 1 else ""
            yield layer.name + place, layer

    def diagnostics(self) -> dict[str, Any]:
        """Counts of what went wrong; for every weight its steps, observations and its curvature's counts."""
        weights = {name: counts(self._entry(layer)) for name, layer in self._by_name()}
        went_wrong = {"fallbacks": int(self._fallbacks), "held_layers": self._held}
        return {"skipped_steps": self.skipped_steps, **went_wrong, "weights": weights}
