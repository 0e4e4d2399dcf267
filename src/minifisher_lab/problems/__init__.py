"""The problems by name: a new one is one row in its family's table."""

from __future__ import annotations

from minifisher_lab.names import look_up
from minifisher_lab.problems import own as own
from minifisher_lab.problems.autoencoders import AUTOENCODERS
from minifisher_lab.problems.cnns import CNNS
from minifisher_lab.problems.problem import Problem as Problem

PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in (*AUTOENCODERS, *CNNS)}
"""Every problem by its name, in the order that the command line lists them."""


def find(name: str) -> Problem:
    """The problem of that name, or the user's own that MODULE:FUNCTION makes."""
    return own.load(name) if ":" in name else look_up("problem", name, PROBLEMS)
