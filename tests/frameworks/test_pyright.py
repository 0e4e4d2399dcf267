"""What pyright says of a user's script in strict mode, and of the types of the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import minifisher
from tests.frameworks.conftest import needs
from tests.test_typing import SCRIPT

needs("pyright")


def test_pyright_knows_the_options_of_every_method(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = [str(Path(module.__file__).parents[1]) for module in (minifisher, torch)]
    settings = {"extraPaths": paths, "typeCheckingMode": "strict", "reportMissingTypeStubs": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "script.py"]
    told = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout)
    errors = {item["range"]["start"]["line"] + 1 for item in told["generalDiagnostics"]}
    wrong = {number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert errors == wrong, told["generalDiagnostics"]


def test_every_public_symbol_has_a_known_type() -> None:
    # pyright looks for packages where the first python of the path finds them.
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--outputjson",
        "--ignoreexternal",
        "--verifytypes",
        "minifisher",
    ]
    told = json.loads(
        subprocess.run(command, env={**os.environ, "PATH": paths}, capture_output=True, text=True).stdout
    )
    report = told["typeCompleteness"]
    unknown = [symbol for symbol in report["symbols"] if not symbol["isTypeKnown"] and symbol["isExported"]]
    assert report["exportedSymbolCounts"]["withKnownType"] > 1000
    assert not unknown, [(symbol["name"], symbol["diagnostics"]) for symbol in unknown]
    assert report["completenessScore"] == 1
