from __future__ import annotations

import inspect
import os
import warnings

import pytest
import torch

import minifisher
from minifisher.callers import warn_caller


def function_in(package, body):
    """A function compiled as if its file belonged to the package."""
    names = {"warn_caller": warn_caller}
    filename = os.path.join(os.path.dirname(package.__file__), "made_up.py")
    exec(compile(f"def function(inner=None):\n    {body}", filename, "exec"), names)
    return names["function"]


warn = function_in(minifisher, "warn_caller('here')")
call_from_torch = function_in(torch, "inner()")
call_from_minifisher = function_in(minifisher, "inner()")


@pytest.mark.parametrize(
    "call",
    [
        lambda: warn(),
        lambda: call_from_minifisher(warn),
        lambda: call_from_torch(warn),
        lambda: call_from_torch(lambda: warn()),
        lambda: call_from_minifisher(torch.no_grad()(warn)),
    ],
    ids=[
        "direct",
        "through minifisher",
        "through torch",
        "a callback of torch",
        "through a decorator of torch",
    ],
)
def test_the_warning_names_the_first_line_outside_minifisher_and_torch(call):
    with pytest.warns(RuntimeWarning, match="here") as caught:
        call()
    assert (caught[0].filename, caught[0].lineno) == (__file__, inspect.getsourcelines(call)[1])


def test_a_package_whose_name_only_begins_alike_is_outside():
    neighbour = os.path.join(os.path.dirname(minifisher.__file__) + "_lab", "made_up.py")
    with pytest.warns(RuntimeWarning, match="here") as caught:
        exec(compile("warn_caller('here')", neighbour, "exec"), {"warn_caller": warn_caller})
    assert caught[0].filename == neighbour


def test_python_shows_it_again_for_the_next_optimizer():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            warn()
    assert len(caught) == 2
