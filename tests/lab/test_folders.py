"""Which folder of the laboratory may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import minifisher_lab

ROOT = Path(minifisher_lab.__file__).parent
ALLOWED = {
    "data": {"files"},
    "problems": {"names"},
    "training": {"data", "problems", "names", "files"},
    "comparison": {"problems", "training", "names", "files"},
    "presentation": {"problems", "training", "comparison", "data", "names", "terminal"},
}


@pytest.mark.parametrize(("folder", "others"), ALLOWED.items(), ids=ALLOWED)
def test_a_folder_imports_only_earlier_ones(folder: str, others: set[str]) -> None:
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minifisher_lab"):
                names = (
                    [alias.name for alias in node.names]
                    if node.module == "minifisher_lab"
                    else [node.module.split(".")[1]]
                )
                assert set(names) <= others | {folder}, f"{path.name} imports {names}"
