"""Writes lists.json, from which `minifisher problems` and `minifisher optimizers` read: torch starts slowly.

python -m minifisher_lab.presentation.write_lists
"""

from __future__ import annotations

import json
from typing import Any

from minifisher_lab.comparison.sizes import SCALES
from minifisher_lab.presentation.lists import WRITTEN, arguments_of, choice_record
from minifisher_lab.problems import FAMILIES
from minifisher_lab.training.optimizers import optimizers


def lists() -> dict[str, Any]:
    """What the lists say, as far as it is the same on every machine."""
    problems = [
        {
            "kind": kind,
            "problem": problem.name,
            "what it is": problem.description,
            "data": str(problem.data),
            "suite": "small" if problem.name in SCALES["small"].problems else "full",
            "batch": problem.batch_size,
            "epochs": problem.epochs,
            "parameters": problem.parameters(),
        }
        for kind, family in FAMILIES.items()
        for problem in family
    ]
    choices = optimizers().values()
    return {
        "problems": problems,
        "optimizers": [choice_record(choice) for choice in choices],
        "arguments": {choice.method.__name__: arguments_of(choice.method) for choice in choices},
    }


if __name__ == "__main__":
    WRITTEN.write_text(json.dumps(lists(), indent=1) + "\n")
