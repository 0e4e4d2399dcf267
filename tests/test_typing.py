"""What a type checker says of a user's script: names, types and choices of every option are known to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import minifisher

SCRIPT = """
import torch, minifisher

model = torch.nn.Linear(3, 2)
minifisher.MBF(model.parameters(), 1e-3, damping=0.1, graft="adam-rows", curvature_dtype=torch.bfloat16)
minifisher.KFAC(model, lr=torch.tensor(1e-3), kl_clip=None)
minifisher.TNT(model, max_dim=3, power=0.5)
minifisher.METHODS["mbf"](model, lr=1e-3)
minifisher.MBF([{"params": [model.weight]}], model=model)
minifisher.create(model, "mbf", lr=1e-3, no_decay=("bias",)).diagnostics(flat=True)
minifisher.register_layer(torch.nn.Linear, transposed=True)
minifisher.MBF(model, damping="large")  # wrong
minifisher.MBF(model, graft="lion")  # wrong
minifisher.MBF(model, betas=(0.9, 0.99))  # wrong
minifisher.TNT(model, max_dim="3")  # wrong
minifisher.KBFGS(model, fisher="empirical")  # wrong
"""


def test_mypy_knows_the_options_of_every_method(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    source = str(Path(minifisher.__file__).parents[1])
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(script)]
    result = subprocess.run(command, env={"MYPYPATH": source}, capture_output=True, text=True, cwd=tmp_path)
    told = [
        line for line in result.stdout.splitlines() if line.startswith("script.py:") and ": error:" in line
    ]
    errors = {int(line.split(":")[1]) for line in told}
    wrong = {number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert errors == wrong, result.stdout + result.stderr
