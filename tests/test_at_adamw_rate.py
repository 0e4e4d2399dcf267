from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "at_adamw_rate.py"


def test_both_optimizers_run_at_adamws_best_rate_and_a_second_call_goes_on(tmp_path: Path) -> None:
    saved = tmp_path / "runs.jsonl"
    command = [
        sys.executable,
        str(SCRIPT),
        "--problems",
        "mlp-tabular",
        "--seeds",
        "0",
        "1",
        "--share",
        "0.02",
    ]
    first, second = (
        subprocess.run([*command, "--saved", str(saved)], check=True, capture_output=True, text=True)
        for _ in range(2)
    )
    (row,) = json.loads(first.stdout)["rows"]
    runs = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(runs) == 3 * 2 + 2  # three rates of AdamW and one of MBF, two seeds each
    means = {
        rate: sum(run["train"] for run in runs if (run["optimizer"], run["rate"]) == ("adamw", rate)) / 2
        for rate in (1e-3, 3e-3, 1e-2)
    }
    assert row["adamw"]["train"] == min(means.values()) == means[row["rate"]]
    assert {run["rate"] for run in runs if run["optimizer"] == "mbf"} == {row["rate"]}
    assert json.loads(second.stdout)["rows"] == [row]
    assert not second.stderr  # nothing is trained twice
