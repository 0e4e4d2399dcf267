"""A problem of the user's own, named MODULE:FUNCTION or FILE.py:FUNCTION on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minifisher_lab.problems.problem import Problem

if TYPE_CHECKING:
    from types import ModuleType

NAME = re.compile(r"[\w.+-]+")


def load(spec: str) -> Problem:
    """Call the function that `spec` names; ValueError says what is wrong with it, or with its problem."""
    module, _, function = spec.rpartition(":")
    make = getattr(_imported(spec, module), function, None)
    if not callable(make):
        raise ValueError(f"{spec}: {module} has no function {function!r}")
    problem = make()
    if not isinstance(problem, Problem):
        raise ValueError(
            f"{spec} returned {type(problem).__name__}: return minifisher_lab.problems.Problem(...)"
        )
    if not NAME.fullmatch(problem.name):
        raise ValueError(
            f"{spec}: the name {problem.name!r} becomes a folder: use letters, digits, . + and - alone"
        )
    return problem


def _imported(spec: str, name: str) -> ModuleType:
    if name.endswith(".py"):
        return _from_file(Path(name))
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder where the command was started
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):
            raise
        message = f"{spec}: there is no module {name} here or among the installed packages"
        raise ValueError(message) from error


def _from_file(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None or not path.is_file():
        raise ValueError(f"there is no file {path}")
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    found.loader.exec_module(module)
    return module


def tensors(problem: Problem) -> tuple[torch.Tensor, ...]:
    """The problem's tensors; ValueError where they do not fit together."""
    assert callable(problem.data)
    parts: Any = problem.data()
    if not (isinstance(parts, (tuple, list)) and len(parts) == 4 and all(map(torch.is_tensor, parts))):
        raise ValueError(
            f"the data of {problem.name} must be four tensors: training inputs, training targets, "
            "test inputs, test targets"
        )
    for name, inputs, targets in (("training", *parts[:2]), ("test", *parts[2:])):
        if len(inputs) != len(targets) or not len(inputs):
            raise ValueError(
                f"{problem.name} has {len(inputs)} {name} inputs and {len(targets)} {name} targets: "
                "give as many, and at least one"
            )
    return tuple(parts)
