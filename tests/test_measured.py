"""The tables of the page From AdamW are what the results files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "from-adamw.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def rows_after(heading: str) -> list[list[str]]:
    """The cells of the first table after that text, without its head."""
    lines = PAGE[PAGE.index(heading) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def agrees(cell: str, value: float) -> bool:
    """Whether the number of the cell, without its deviation, is the value rounded to as many digits."""
    text = cell.split(" ± ")[0]
    mantissa = re.sub(r"e.*", "", text).replace("-", "")
    decimals = len(mantissa.partition(".")[2])
    exponent = int(text.partition("e")[2] or 0)
    return abs(float(text) - value) <= 0.51 * 10.0 ** (exponent - decimals)


@pytest.mark.parametrize(
    ("heading", "file"),
    [
        ("### Twelve problems at AdamW's own best rate", "at_adamw_rate.json"),
        ("Five times as many steps", "at_adamw_rate_long.json"),
    ],
)
def test_runs_at_the_rate_of_adamw(heading: str, file: str) -> None:
    measured = {row["problem"]: row for row in json.loads((RESULTS / file).read_text())["rows"]}
    table = rows_after(heading)
    assert {name for name, *_ in table} == measured.keys()
    for name, steps, rate, adamw, mbf, ratio, test, *accuracy in table:
        row = measured[name]
        assert (int(steps), float(rate)) == (row["steps"], row["rate"])
        assert agrees(adamw, row["adamw"]["train"]), (name, adamw)
        assert agrees(mbf, row["mbf"]["train"]), (name, mbf)
        assert agrees(ratio, row["mbf"]["train"] / row["adamw"]["train"]), (name, ratio)
        for cell, of in zip(test.split(" / "), ("adamw", "mbf"), strict=True):
            assert agrees(cell, row[of]["test"]), (name, cell)
        for cell, of in zip(filter(None, "".join(accuracy).split(" / ")), ("adamw", "mbf"), strict=False):
            assert agrees(cell, row[of]["accuracy"]), (name, cell)


def test_the_table_of_learning_rates() -> None:
    problem = ""
    for name, optimizer, *losses in rows_after("Best training loss in 10 epochs"):
        problem = name or problem
        results = json.loads((RESULTS / "learning_rates" / f"{problem.replace('-', '_')}.json").read_text())
        means = {(row["optimizer"], row["rate"]): row["best_loss"]["mean"] for row in results["all"]}
        for cell, rate in zip(losses, (1e-3, 3e-3, 1e-2, 3e-2), strict=True):
            assert agrees(cell, means[optimizer, rate]), (problem, optimizer, rate)
