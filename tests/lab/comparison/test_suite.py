from __future__ import annotations

import math
import os
import platform
import sqlite3
from dataclasses import replace
from typing import TYPE_CHECKING

import killed_suite
import optuna
import pytest
from killed_suite import CPU, Silent, finish, killed, records, start, table, tiny_plan

import minifisher
from minifisher_lab.comparison import fit, machine, worker
from minifisher_lab.comparison.sizes import SCALES
from minifisher_lab.comparison.spaces import entrants
from minifisher_lab.comparison.study import StudyError, StudyFile
from minifisher_lab.comparison.suite import SuitePlan, make_plan, open_study
from minifisher_lab.comparison.worker import Worker
from minifisher_lab.problems import FAMILIES, PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import optimizers

if TYPE_CHECKING:
    from pathlib import Path

    from minifisher_lab.comparison.spaces import Entrant
    from minifisher_lab.comparison.study import Unit


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a suite that was not killed."""
    path = tmp_path_factory.mktemp("suite") / "whole.sqlite"
    finish(path)
    return path


def test_a_suite_that_was_killed_three_times_has_the_same_table(whole: Path, tmp_path: Path) -> None:
    assert killed(tmp_path / "cut.sqlite", times=3, longest=1.5)
    assert table(tmp_path / "cut.sqlite") == table(whole)


def test_two_processes_share_the_work(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.sqlite"
    workers = [start(path), start(path)]
    for process in workers:
        process.join()
    assert [process.exitcode for process in workers] == [0, 0]
    assert table(path) == table(whole)
    assert killed_suite.trials(path) == tiny_plan().total


def test_a_finished_suite_measures_nothing(whole: Path) -> None:
    before = records(whole)
    finish(whole)
    assert records(whole) == before


def test_every_method_takes_part_and_has_equal_trials() -> None:
    plan = make_plan("small")
    names = set(minifisher.METHODS) | {"mbf-default", "adamw", "adam", "sgd", "muon"}
    assert names <= set(plan.by_name)
    assert all(entrant.spec in optimizers() for entrant in plan.entrants)
    tuned = [entrant for entrant in plan.entrants if entrant.space]
    assert {plan.trials_of(entrant) for entrant in tuned} == {plan.trials}
    assert all("damping" in entrants()[name].space for name in minifisher.METHODS)
    assert plan.seeds >= 3
    assert len(list(plan.units())) == len(set(plan.units())) == plan.total


def test_the_plan_survives_json() -> None:
    plan = make_plan("small", ["cnn-digits"], ["mbf", "sgd"], trials=4, seeds=3, hours=1)
    assert SuitePlan.from_json(plan.as_json()).as_json() == plan.as_json()


def test_a_study_of_another_plan_is_refused(whole: Path) -> None:
    for plan, word in ((replace(tiny_plan(), trials=9), "trials = 3"), (make_plan("small"), "epochs = ")):
        with pytest.raises(StudyError, match=word):
            open_study(whole, plan, CPU)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no study\n" * 100)
    with pytest.raises(StudyError, match="is no study of minifisher"):
        StudyFile(tmp_path / "notes.txt")
    with pytest.raises(StudyError, match="there is no study"):
        StudyFile(tmp_path / "none.sqlite")


def _new(path: Path, **changes: object) -> tuple[StudyFile, SuitePlan]:
    plan = make_plan("small", ["cnn-digits"], ["adamw"], trials=1, seeds=1, epochs=2 / 22, **changes)  # type: ignore[arg-type]
    return open_study(path, plan, CPU)


@pytest.mark.parametrize("name", ["odd dir/50%20#a b.sqlite", "what?.sqlite", "{x}[y]:@&.sqlite"])
def test_a_study_may_have_any_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    study, plan = _new(path)
    assert study.records(next(plan.units()).pair) == {}
    assert list(path.parent.iterdir()) == [path]
    path.with_name(f".{path.name}.999999999.part").touch()  # of a process that was killed
    path.unlink()
    _new(path)
    assert list(path.parent.iterdir()) == [path]


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    study, plan = _new(tmp_path / "study.sqlite")
    unit = next(plan.units())
    mine = machine.started(os.getpid())
    for host, pid, began, free in (
        (platform.node(), os.getpid(), mine, False),
        (platform.node(), os.getpid(), 1.0, True),  # the number of a dead process was given to a new one
        (platform.node(), 2**22 + 1, mine, True),
        ("elsewhere", 1, 1.0, False),
    ):
        with sqlite3.connect(study.path) as connection:
            claim = (unit.key, host, pid, began)
            connection.execute("INSERT OR REPLACE INTO claim VALUES (?, ?, ?, ?)", claim)
        connection.close()
        assert study.claim(unit) is free
    assert study.others() == [(unit.key, "elsewhere", 1)]
    assert study.claim(unit, take_over=True)


def test_the_exception_of_an_optimizer_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(worker, "train", broken)
    study, plan = _new(tmp_path / "study.sqlite")
    Worker(study, plan, CPU).work(Silent())
    found = list(records(study.path).values())
    assert [record.status for record in found] == ["failed", "failed"]
    assert found[0].error == "RuntimeError: no such kernel"
    assert found[0].loss == math.inf


def test_a_shared_machine_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, plan = _new(tmp_path / "study.sqlite")
    cores = os.cpu_count() or 1
    monkeypatch.setattr(machine, "load_average", lambda: 0.5)
    monkeypatch.setattr(StudyFile, "others", lambda self: [("other", platform.node(), 1)])
    units = list(plan.units())
    for unit, load, others in ((units[0], 0.5, ["x"]), (units[1], cores + 1.0, [])):
        monkeypatch.setattr(machine, "load_average", lambda load=load: load)
        monkeypatch.setattr(StudyFile, "others", lambda self, o=others: [(x, platform.node(), 1) for x in o])
        _measure(study, plan, unit)
    first, second = records(study.path).values()
    assert (first.neighbours, first.shared) == (1, True)
    assert (second.neighbours, second.shared) == (0, True)
    assert not replace(second, load=cores).shared


def _measure(study: StudyFile, plan: SuitePlan, unit: Unit) -> None:
    one = Worker(study, plan, CPU)
    one.done()
    study.finish(one._measured(unit, Silent()), {})


def _costs(monkeypatch: pytest.MonkeyPatch, **costs: fit.Cost) -> None:
    def cost(plan: object, problem: str, entrant: Entrant, splits: object) -> fit.Cost:
        if entrant.name not in costs:
            raise TypeError("no such layer")
        return costs[entrant.name]

    monkeypatch.setattr(fit, "cost_of_run", cost)


def test_a_budget_reduces_trials_and_epochs_of_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    names, numbers = ["adamw", "mbf"], {"trials": 8, "seeds": 3, "epochs": 100.0}
    plan = make_plan("small", ["cnn-digits", "mlp-tabular"], names, **numbers)  # type: ignore[arg-type]
    _costs(monkeypatch, adamw=fit.Cost(100, 1), mbf=fit.Cost(300, 2))
    # 11 runs of either on both problems: 22 (100 + 300) s of training and 22 x 25 (1 + 2) s of evaluation
    whole = 22 * 400 + 22 * 25 * 3
    reduced = fit.fitted(replace(plan, hours=whole / 4 / 3600), CPU)
    assert (reduced.trials, reduced.seeds, reduced.points) == (4, 3, 12)
    assert {reduced.trials_of(entrant) for entrant in reduced.entrants} == {4}
    kept = (whole / 4 - 14 * 12 * 3) / (14 * 400)
    assert reduced.epochs == pytest.approx({"cnn-digits": 100 * kept, "mlp-tabular": 100 * kept}, rel=0.01)
    assert fit.fitted(replace(plan, hours=whole / 3600 + 1e-6), CPU).epochs == plan.epochs
    with pytest.raises(StudyError, match=r"less than 5% of their epochs: give more hours"):
        fit.fitted(replace(plan, hours=whole / 40 / 3600), CPU)


def test_a_budget_leaves_a_few_trials_and_points(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("small", ["cnn-digits"], ["adamw"], trials=8, seeds=1, epochs=1000)
    _costs(monkeypatch, adamw=fit.Cost(1000, 0))
    reduced = fit.fitted(replace(plan, hours=500 / 3600), CPU)
    assert (reduced.trials, reduced.points, reduced.epochs["cnn-digits"]) == (3, 10, 125)
    few = fit.fitted(replace(plan, trials=2, points=4, hours=500 / 3600), CPU)
    assert (few.trials, few.points) == (2, 4)


def test_the_time_of_a_run_is_measured() -> None:
    plan = make_plan("small", ["cnn-digits"], ["adamw"], epochs=10)
    (entrant,) = plan.entrants
    splits = batches.load(PROBLEMS["cnn-digits"], CPU)
    cost = fit.cost_of_run(plan, "cnn-digits", entrant, splits)
    assert cost.training > 0 < cost.point


def test_the_time_of_a_run_has_its_start_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("small", ["cnn-digits"], ["adamw"], trials=8, seeds=1, epochs=1000)
    _costs(monkeypatch, adamw=fit.Cost(training=100, point=1, start=50))
    # 9 runs of 25 points
    whole = 9 * (100 + 25 + 50)
    assert fit.fitted(replace(plan, hours=whole / 3600 + 1e-6), CPU).epochs == plan.epochs
    reduced = fit.fitted(replace(plan, hours=whole / 4 / 3600), CPU)
    kept = (whole / 4 - 5 * (50 + 12)) / (5 * 100)
    assert (reduced.trials, reduced.points) == (4, 12)
    assert reduced.epochs["cnn-digits"] == pytest.approx(1000 * kept, rel=0.01)


def test_the_start_of_a_published_run_is_measured() -> None:
    plan = make_plan("small", ["autoencoder-digits"], ["mbf-published"], epochs=10)
    (entrant,) = plan.entrants
    splits = batches.load(PROBLEMS["autoencoder-digits"], CPU)
    assert fit.cost_of_run(plan, "autoencoder-digits", entrant, splits).start > 0.01


def test_an_optimizer_that_cannot_run_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("small", ["cnn-digits"], ["adamw", "kfac"], trials=1, seeds=1, epochs=10, hours=1)
    _costs(monkeypatch, adamw=fit.Cost(1000, 0))
    assert fit.fitted(plan, CPU).epochs == plan.epochs


def test_a_plan_is_kept_if_no_optimizer_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan("small", ["cnn-digits"], ["kfac"], trials=1, seeds=1, epochs=10, hours=1)
    _costs(monkeypatch)
    assert fit.fitted(plan, CPU) == plan


def test_every_kind_of_network_is_in_the_small_suite() -> None:
    small = set(SCALES["small"].problems)
    kinds = {kind for kind, family in FAMILIES.items() if small & {problem.name for problem in family}}
    assert kinds == set(FAMILIES) - {"Large convolutional networks"}
    assert set(SCALES["full"].problems) == set(PROBLEMS)


def test_a_run_carries_the_machine_and_the_commit(whole: Path) -> None:
    record = next(iter(records(whole).values()))
    assert {"cores", "threads", "torch", "python", "host", "minifisher", "commit"} <= set(record.machine)
    assert record.machine["threads"] == 1


def test_optuna_reads_the_file(whole: Path) -> None:
    study = optuna.load_study(study_name="cnn-digits/mbf", storage=f"sqlite:///{whole}")
    plan = tiny_plan()
    assert len(study.trials) == plan.trials + plan.seeds
    assert set(study.best_params) == {"lr", "damping"}
