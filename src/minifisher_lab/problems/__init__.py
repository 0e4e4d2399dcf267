"""The problems by name: a new one is one row in its family's table."""

from __future__ import annotations

from minifisher_lab.names import look_up
from minifisher_lab.problems import own as own
from minifisher_lab.problems.autoencoders import AUTOENCODERS
from minifisher_lab.problems.cnns import LARGE, SMALL
from minifisher_lab.problems.graphs import GRAPHS
from minifisher_lab.problems.problem import Problem as Problem
from minifisher_lab.problems.recurrent import RECURRENT
from minifisher_lab.problems.tables import TABLES
from minifisher_lab.problems.transformers import TRANSFORMERS

FAMILIES: dict[str, tuple[Problem, ...]] = {
    "Autoencoders": AUTOENCODERS,
    "Small convolutional networks": SMALL,
    "Large convolutional networks": LARGE,
    "Graph networks": GRAPHS,
    "Transformers": TRANSFORMERS,
    "Recurrent networks": RECURRENT,
    "Tables": TABLES,
}
"""The tables of problems by the kind of network, in the order that the command line lists them."""

PROBLEMS: dict[str, Problem] = {problem.name: problem for family in FAMILIES.values() for problem in family}
"""Every problem by its name."""


def find(name: str) -> Problem:
    """The problem of that name, or the user's own that MODULE:FUNCTION makes."""
    return own.load(name) if ":" in name else look_up("problem", name, PROBLEMS)
