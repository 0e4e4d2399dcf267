"""The problems by name: a new one is one row in its family's table."""

from __future__ import annotations

from minifisher_lab.problems.autoencoders import AUTOENCODERS
from minifisher_lab.problems.cnns import CNNS
from minifisher_lab.problems.problem import Problem as Problem

PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in (*AUTOENCODERS, *CNNS)}
"""Every problem by its name, in the order that the command line lists them."""
