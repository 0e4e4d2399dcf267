"""Which layers an estimator of the Fisher matrix can read."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from minifisher.statistics.layers import Layer


def check_estimators(method: str, estimators: Sequence[str], layers: Iterable[tuple[Layer, str]]) -> None:
    """Raise ValueError where no layer can serve an estimator; each layer comes with its group's `fisher`.

    Of all groups that ask for one estimator, some layer must be readable; other groups may hold norms alone.
    """
    asking: dict[str, list[Layer]] = defaultdict(list)
    for layer, fisher in layers:
        asking[fisher].append(layer)
    for fisher, members in asking.items():
        if fisher != "gradient" and not any(layer.reads_samples for layer in members):
            obstacles = "; ".join(f"{note} ({name})" for note, name in _obstacles(members).items())
            way_out = ', or use fisher="gradient"' if "gradient" in estimators else ""
            raise ValueError(
                f"fisher={fisher!r} looks inside the backward pass of Linear and convolution layers and "
                f"{method} was given none: {obstacles}. Pass the nn.Module that holds them, as params or as "
                "model=; of a linear layer with a class of its own tell minifisher.register_layer"
                f"{way_out}"
            )


def _obstacles(layers: Sequence[Layer]) -> dict[str, str]:
    """Every reason why a layer cannot be read -> the first layer that it holds for."""
    found: dict[str, str] = {}
    for layer in layers:
        found.setdefault(layer.note.removesuffix(": only its gradient is read"), layer.name)
    return found
