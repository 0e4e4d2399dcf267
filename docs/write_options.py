"""Write docs/options.md from the declarations of the options: `python docs/write_options.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import minifisher
from minifisher.options import options_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from minifisher.options import Option

PAGE = Path(__file__).parent / "options.md"

START = """\
# Options

Every option is declared once, in the class of its method. This page is generated from those declarations:
change the declaration, then run `python docs/write_options.py`. What the options mean for each method, and
the measurements behind the defaults, stand in [methods.md](methods.md).

`params` (a module, or whatever `torch.optim` takes) and `lr` may be passed by position, all others by name.
Parameter groups may differ in every option that is not listed at the end of this page. As in `torch.optim`,
a change of `lr`, `momentum`, `curvature_decay`, `damping`, `weight_decay`, `decoupled_weight_decay`,
`length`, `length_limit`, `maximize`, `jitter` or `adaptive_damping` in `optimizer.param_groups` takes
effect in the next step. The other options are read when parameters are added and when a checkpoint is loaded.
"""

FIXED = "A checkpoint must be loaded into an optimizer with the same value of"


def text() -> str:
    """The whole page."""
    common = minifisher.CurvatureOptimizer.options
    parts = [START, "## Options of every method\n", options_table(common.values())]
    for method in minifisher.METHODS.values():
        parts += [f"## {method.__name__}\n", _of_method(method)]
    every = {
        option.name: option for method in minifisher.METHODS.values() for option in method.options.values()
    }
    shared = _names(option.name for option in every.values() if not option.per_group)
    fixed = _names(option.name for option in every.values() if option.fixed)
    parts += ["## One value for all parameter groups\n", shared]
    parts += ["## Fixed once there is a state\n", f"{FIXED} {fixed}"]
    return "\n".join(parts)


def _of_method(method: type[minifisher.CurvatureOptimizer]) -> str:
    """What the method adds, and what differs from the options of every method."""
    common = minifisher.CurvatureOptimizer.options
    own = [_narrowed(option, method) for option in method.options.values()]
    rows = [option for option in own if not _same(option, common.get(option.name))]
    hidden = [option.name for option in own if not option.init and common[option.name].init]
    without = f"\nIt has no option {_names(hidden)}" if hidden else ""
    return options_table(rows) + without


def _narrowed(option: Option, method: type[minifisher.CurvatureOptimizer]) -> Option:
    """`fisher` with the estimators of this method alone."""
    return replace(option, choices=method.estimators) if option.name == "fisher" else option


def _same(option: Option, common: Option | None) -> bool:
    names = ("default", "init", "range", "meaning")
    return common is not None and all(getattr(option, name) == getattr(common, name) for name in names)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) + ".\n"


if __name__ == "__main__":
    PAGE.write_text(text())
