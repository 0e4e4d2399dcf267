"""Structured-curvature optimizers for PyTorch: mini-block Fisher and its rivals on one engine."""

from minifisher.methods.kbfgs import KBFGS as KBFGS
from minifisher.methods.kbfgsl import KBFGSL as KBFGSL
from minifisher.methods.kfac import KFAC as KFAC
from minifisher.methods.mbf import MBF as MBF
from minifisher.methods.shampoo import Shampoo as Shampoo
from minifisher.methods.soap import SOAP as SOAP
from minifisher.methods.tnt import TNT as TNT
from minifisher.optimizer import CurvatureOptimizer as CurvatureOptimizer
from minifisher.statistics.layers import register_layer as register_layer

__version__ = "0.1.0"
"""The version; pyproject.toml reads it here."""

_PUBLIC = (MBF, KFAC, KBFGS, KBFGSL, Shampoo, SOAP, TNT)  # one entry here registers a method

METHODS: dict[str, type[CurvatureOptimizer]] = {method.__name__.lower(): method for method in _PUBLIC}
"""The methods by lower-case name: the command line, the comparison and the property tests read it."""
