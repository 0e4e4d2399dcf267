from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minifisher_lab import cli
from minifisher_lab.training import processes

ARGUMENTS = ("train", "autoencoder-digits", "--lr", "1e-3", "--epochs", "1", "--points", "4")


def _train(folder: Path, count: int, optimizer: str) -> tuple[list[dict[str, Any]], str]:
    """The logged points of the only run folder, and the printed output."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    command = (*(torchrun if count > 1 else ()), "-m", "minifisher_lab", *ARGUMENTS)
    result = subprocess.run(
        [sys.executable, *command, "--optimizer", optimizer, "--folder", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (run,) = folder.iterdir()
    (lines,) = run.glob("*.jsonl")
    assert (run / "results.json").exists()
    return [json.loads(line) for line in lines.read_text().splitlines()], result.stdout


@pytest.mark.parametrize(
    "optimizer", ["mbf:damping=0.1", "mbf:damping=0.1:fisher=empirical:shard_curvature=True"]
)
def test_two_processes_train_like_one(tmp_path: Path, optimizer: str) -> None:
    (points, _), (shared, printed) = (_train(tmp_path / str(n), n, optimizer) for n in (1, 2))
    assert printed.count("Best loss:") == printed.count("MBF: 233,574 parameters") == 1
    assert [point["step"] for point in shared] == [point["step"] for point in points]
    # Steps amplify the rounding of sums that are taken in another order.
    for name in ("batch_loss", "train_loss", "test_loss"):
        assert [point[name] for point in shared] == pytest.approx([p[name] for p in points], rel=1e-3)
    assert shared[-1]["train_loss"] < 0.8 * shared[0]["train_loss"]


def test_a_batch_that_cannot_be_split_equally_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="100 samples cannot be split equally between 3 processes"):
        processes.check_shares(100)
    processes.check_shares(99)


@pytest.mark.parametrize("command", [("tune", "autoencoder-digits"), ("demo",)])
def test_tune_and_demo_refuse_torchrun(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    assert "runs in one process" in result.output
