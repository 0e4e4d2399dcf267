"""The written lists are those of the problems and optimizers that exist."""

from __future__ import annotations

import json

from minifisher_lab.presentation.lists import WRITTEN
from minifisher_lab.presentation.write_lists import lists


def test_the_written_lists_are_current() -> None:
    assert json.loads(WRITTEN.read_text()) == lists(), "run python -m minifisher_lab.presentation.write_lists"
