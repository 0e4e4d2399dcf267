from __future__ import annotations

from typing import TYPE_CHECKING

from minifisher_lab.training.runs import RunFolder

if TYPE_CHECKING:
    from pathlib import Path


def test_run_folders_never_replace_each_other(tmp_path: Path) -> None:
    assert len({RunFolder.create(tmp_path, "demo").path for _ in range(3)}) == 3
