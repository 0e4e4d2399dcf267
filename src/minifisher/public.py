"""The public names: `import minifisher` hands out what this file defines or imports under its own name."""

from __future__ import annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from minifisher.decay_groups import groups_by_decay as _groups_by_decay
from minifisher.methods.kbfgs import KBFGS as KBFGS
from minifisher.methods.kbfgsl import KBFGSL as KBFGSL
from minifisher.methods.kfac import KFAC as KFAC
from minifisher.methods.mbf import MBF as MBF
from minifisher.methods.shampoo import Shampoo as Shampoo
from minifisher.methods.soap import SOAP as SOAP
from minifisher.methods.tnt import TNT as TNT
from minifisher.optimizer import CurvatureOptimizer as CurvatureOptimizer
from minifisher.statistics.layers import register_layer as register_layer

if _TYPE_CHECKING:
    from collections.abc import Collection as _Collection

    from torch import nn as _nn

_PUBLIC = (MBF, KFAC, KBFGS, KBFGSL, Shampoo, SOAP, TNT)  # one entry here registers a method

METHODS: dict[str, type[CurvatureOptimizer]] = {method.__name__.lower(): method for method in _PUBLIC}
"""The methods by lower-case name: the command line, the comparison and the property tests read it."""


def create(
    model: _nn.Module, method: str = "mbf", *, no_decay: _Collection[str] = (), **options: _Any
) -> CurvatureOptimizer:
    """Make the optimizer of that name: `create(model, "mbf", lr=1e-3, weight_decay=0.01, no_decay=["bias"])`.

    A parameter is not decayed if its name, or the class of its module, contains a word of `no_decay`; upper
    and lower case are the same. `options` are those of the method. Samples can be read in both groups.

    Raises ValueError for an unknown method, TypeError if `no_decay` is one string.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if not no_decay:
        return METHODS[method](model, **options)
    return METHODS[method](_groups_by_decay(model, no_decay), model=model, **options)
