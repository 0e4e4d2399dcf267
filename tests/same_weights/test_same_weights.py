"""This version trains every network as the commit in BASELINE does, and goes on from old checkpoints.

By default some of the cases of train.py are compared, with MINIFISHER_ALL=1 all of them.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import one_thread
from tests.same_weights import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BASELINE = (HERE / "BASELINE").read_text().splitlines()[-1].strip()
SOME = [
    *train.minifisher.METHODS,
    "mbf, resumed",
    "mbf, copied",
    "mbf, now and then",
    "mbf one-sided",
    "mbf rows",
    "mbf kernels packed",
    "mbf kernels inverted",
    "mbf empirical, rows",
    "mbf bias folded, empirical",
    "mbf lengths by row",
    "mbf capturable",
    "mbf adaptive damping",
    "mbf two groups",
    "mbf bfloat16",
    "mbf micro-batches",
    "mbf scaled and clipped",
    "kfac eigenvalues",
    "kfac clipped",
    "kbfgs warm start",
    "kbfgsl three pairs",
    "shampoo newton",
    "tnt by sample",
    "mbf, replicas",
    "kfac, replicas, shared out",
    "mbf kernels, pieces",
]
NAMES = list(train.CASES) if os.environ.get("MINIFISHER_ALL") == "1" else SOME


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True).stdout


def old_source(folder: Path) -> Path:
    """The source tree of BASELINE, extracted."""
    try:
        archive = git("archive", BASELINE, "src")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs git and commit {BASELINE[:7]}, which a shallow clone does not have: {error}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder / "src"


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "train.py"), str(output), "--only", *NAMES]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(source)})


def read(source: Path, output: Path) -> dict[str, Any]:
    told = json.loads(output.read_text())
    assert Path(told["source"]).is_relative_to(source), "another minifisher was imported"
    return told["cases"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the old source and the present one become."""
    folder = tmp_path_factory.mktemp("same_weights")
    sources = {"old": old_source(folder), "new": ROOT / "src"}
    outputs = {name: folder / f"{name}.json" for name in sources}
    running = [start(source, outputs[name]) for name, source in sources.items()]
    assert [process.wait() for process in running] == [0, 0]
    return read(sources["old"], outputs["old"]), read(sources["new"], outputs["new"])


def without_new_options(groups: list[dict[str, str]], old: list[dict[str, str]]) -> list[dict[str, str]]:
    """Saved groups without the options that the old source did not have: they must be off by default."""
    return [
        {name: value for name, value in group.items() if name in known}
        for group, known in zip(groups, old, strict=True)
    ]


def test_every_case_trains_as_before(records: tuple[dict[str, Any], dict[str, Any]]) -> None:
    old, new = records
    for name, record in new.items():
        record["groups"] = without_new_options(record["groups"], old[name]["groups"])
    differing = {
        name: [key for key in old[name] if old[name][key] != new.get(name, {}).get(key)] for name in old
    }
    assert not {name: keys for name, keys in differing.items() if keys}


def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    records: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    _, new = records
    pairs = [name.rpartition(", ") for name in new if name.endswith((", resumed", ", copied"))]
    assert pairs
    assert not [name for name, comma, how in pairs if new[name] != new[f"{name}{comma}{how}"]]


@pytest.mark.parametrize("name", train.CHECKPOINTS)
def test_an_old_checkpoint_goes_on_as_it_did_then(name: str) -> None:
    saved = torch.load(HERE / "checkpoint_format_1.pt", weights_only=True)[name]
    with one_thread():
        weights = train.gone_on(train.CHECKPOINTS[name], saved)
    # Equal to the last bit on the machine that wrote the file; another BLAS may round otherwise.
    torch.testing.assert_close(weights, saved["weights"], rtol=1e-12, atol=1e-12)
