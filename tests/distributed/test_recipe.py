"""The recipe for FSDP2 runs under torchrun as it stands on the page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = r"<!-- not run: several processes -->\n```python\n(.*?)^```"
# Models, optimizer and group are released before the interpreter ends: a thread of gloo that frees
# a tensor later than that aborts the process ("terminate called without an active exception").
SCRIPT = """
import gc

import torch
from torch import nn
from tests.test_docs import given

names = {{"nn": nn, **given()}}
exec({!r}, names)
for name, counts in names["optimizer"].diagnostics()["weights"].items():
    assert counts["step"] == len(names["loader"]) and counts["observations"], name
torch.distributed.barrier()
names.clear()
gc.collect()
torch.distributed.destroy_process_group()
"""


def test_the_recipe_for_fsdp2_runs(tmp_path: Path) -> None:
    (block,) = re.findall(BLOCK, (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL | re.MULTILINE)
    block = block.replace("init_process_group()", 'init_process_group("gloo")')
    (tmp_path / "script.py").write_text(SCRIPT.format(block))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # torchrun with two processes would choose the GPU of a machine that has one alone.
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")], env=paths, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
