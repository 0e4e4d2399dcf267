"""The example scripts; the first word of a file's name is the package that it needs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from tests.frameworks.conftest import needs

EXAMPLES = Path(__file__).parents[2] / "examples" / "frameworks"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(path.name.partition("_")[0])
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("epoch")]
    assert losses[-1] < losses[0] / 2
