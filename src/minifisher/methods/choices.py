"""Options and choices that several methods have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minifisher.linalg.dense import working_dtype
from minifisher.options import option
from minifisher.statistics.records import BatchGradient, LayerSamples

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from minifisher.statistics.layers import Layer


def power_option(default: float) -> Any:
    """The declaration of `power`, whose default differs between the methods."""
    return option(
        default=default,
        above=0,
        note="1 for the inverse, 0.5 for the inverse root",
        meaning="Exponent of the inverse of the damped curvature, or of each of its factors.",
    )


def curvature_dtype(layer: Layer, options: Mapping[str, Any]) -> torch.dtype:
    """The dtype that the curvature of a layer has: as asked for, or the weight's, at least float32."""
    asked: torch.dtype | None = options["curvature_dtype"]
    return asked or working_dtype(layer.weight.dtype)


def gradient_or_samples(layer: Layer, options: Mapping[str, Any]) -> type[BatchGradient] | type[LayerSamples]:
    """What a method that can read either reads: samples where they are asked for and can be captured."""
    from_gradient = options["fisher"] == "gradient" or not layer.reads_samples
    return BatchGradient if from_gradient else LayerSamples
