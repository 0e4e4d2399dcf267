"""Kill a tiny suite at random moments and compare its table with that of a suite that was not killed.

python tests/lab/comparison/killed_suite.py 30
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minifisher_lab.comparison.study import Record, StudyFile
from minifisher_lab.comparison.suite import SuitePlan, make_plan, open_study
from minifisher_lab.comparison.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from minifisher_lab.comparison.study import Unit

CPU = torch.device("cpu")
STARTS = multiprocessing.get_context("forkserver")  # imports once, then every start is quick
STARTS.set_forkserver_preload(["minifisher_lab.comparison.worker", "torch._dynamo"])


class Silent:
    """A watcher that shows nothing."""

    def began(self, unit: Unit, setting: Mapping[str, float]) -> None: ...

    def moved(self, spent: float, loss: float) -> None: ...

    def ended(self, record: Record, done: int, seconds_left: float) -> None: ...

    def waiting(self, others: Sequence[tuple[str, str, int]]) -> None: ...


def tiny_plan() -> SuitePlan:
    """Two optimizers, one of them also untuned, with runs of two steps."""
    names = ("mbf-default", "mbf", "adamw")
    return make_plan("small", ["cnn-digits"], names, trials=3, seeds=1, epochs=2 / 22)


def work(path: Path) -> None:
    """Do all that is left, in this process."""
    torch.set_num_threads(1)
    study, plan = open_study(path, tiny_plan(), CPU)
    Worker(study, plan, CPU).work(Silent())


def start(path: Path) -> Any:
    process = STARTS.Process(target=work, args=(path,))
    process.start()
    return process


def finish(path: Path) -> None:
    process = start(path)
    process.join()
    assert process.exitcode == 0, f"the suite ended with {process.exitcode}"


def records(path: Path) -> dict[str, Record]:
    if not path.exists():
        return {}
    study = StudyFile(path)
    plan = SuitePlan.from_json(study.planned)
    pairs = [f"{problem}/{name}" for problem in plan.epochs for name in plan.by_name]
    return {key: record for pair in pairs for key, record in study.records(pair).items()}


def table(path: Path) -> dict[str, Any]:
    """Everything that was measured, but for times and circumstances."""
    study = StudyFile(path)
    rows = {}
    for key, record in records(path).items():
        run = {name: value for name, value in asdict(record.run).items() if name != "seconds"}
        points = [{**asdict(point), "seconds": None} for point in study.points(record.unit)]
        rows[key] = (record.setting, record.best_loss, record.error, run, points)
    return rows


def trials(path: Path) -> int:
    """How many runs were stored, each time that one was stored."""
    study = StudyFile(path)
    pairs = {record.unit.pair for record in records(path).values()}
    return sum(len(study._study(pair).get_trials()) for pair in pairs)


def killed(path: Path, times: int, longest: float, seed: int = 0) -> int:
    """Start the suite and kill it, so often; then let it finish. Returns how many kills met it alive."""
    moments = random.Random(seed)
    alive = 0
    kept: dict[str, Record] = {}
    for _ in range(times):
        process = start(path)
        time.sleep(moments.uniform(0, longest))
        alive += process.is_alive()
        process.kill()
        process.join()
        found = records(path)
        assert {key: found[key] for key in kept} == kept, "a finished run was lost or measured again"
        kept = found
    finish(path)
    assert {key: record for key, record in records(path).items() if key in kept} == kept
    assert trials(path) == len(records(path)) == tiny_plan().total
    return alive


def main(times: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole.sqlite", Path(folder) / "cut.sqlite"
        began = time.monotonic()
        finish(whole)
        seconds = time.monotonic() - began
        alive = killed(cut, times, longest=max(0.5, 3 * seconds / times), seed=random.randrange(10**6))
        assert table(cut) == table(whole)
    print(f"{times} kills, {alive} of them while the suite ran ({seconds:.1f} s unkilled): equal tables")


if __name__ == "__main__":
    main(int(sys.argv[1]))
