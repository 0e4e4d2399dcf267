from __future__ import annotations

import inspect
import os
import warnings

import pytest
import torch

import minifisher
from minifisher.callers import stacklevel_of_caller


def function_in(package, body):
    """A function compiled as if its file belonged to the package."""
    names = {"warnings": warnings, "stacklevel_of_caller": stacklevel_of_caller}
    filename = os.path.join(os.path.dirname(package.__file__), "made_up.py")
    exec(compile(f"def function(inner=None):\n    {body}", filename, "exec"), names)
    return names["function"]


warn = function_in(minifisher, "warnings.warn('here', stacklevel=stacklevel_of_caller())")
call_from_torch = function_in(torch, "inner()")
call_from_minifisher = function_in(minifisher, "inner()")


def test_outside_of_the_package_the_stacklevel_is_one():
    assert stacklevel_of_caller() == 1


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
    with pytest.warns(UserWarning, match="here") as caught:
        call()
    assert (caught[0].filename, caught[0].lineno) == (__file__, inspect.getsourcelines(call)[1])


def test_a_package_whose_name_only_begins_alike_is_outside():
    neighbour = os.path.dirname(minifisher.__file__) + "_lab"
    names = {"stacklevel_of_caller": stacklevel_of_caller}
    exec(compile("level = stacklevel_of_caller()", os.path.join(neighbour, "made_up.py"), "exec"), names)
    assert names["level"] == 1
