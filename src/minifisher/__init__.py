"""Structured-curvature optimizers for PyTorch: mini-block Fisher and its rivals on one engine."""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from minifisher.public import *  # noqa: F403 - `public` says what is public, and nothing twice

__version__ = "0.1.0"
"""The version; pyproject.toml reads it here."""


# torch takes seconds to import, and `python -m minifisher --help` needs none of it. A type checker would take
# `__getattr__` for leave to use any name.
if not _TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """A public name, or a module that the library has imported; the first use imports the library."""
        if name == "__all__" or not name.startswith("_"):
            _load()
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        _load()
        return sorted(globals())


def _load() -> None:
    """Import the library and take over its public names; `from minifisher import *` asks for `__all__`."""
    library = vars(_import_module("minifisher.public"))
    names = {name: value for name, value in library.items() if name[0] != "_" and name != "annotations"}
    globals().update(names, __all__=list(names))
