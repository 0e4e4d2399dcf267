"""Run folders: names that never collide, whole files, and a disk that fills up."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from minifisher_lab import files
from minifisher_lab.training.runs import NotWritten, Point, Run, RunFolder, Unresumable, remedy

CPU = torch.device("cpu")


def _points(count: int) -> list[Point]:
    return [Point(step, step / 10, float(step), 1.0, 2.0 - step, 3.0, None) for step in range(count)]


def _run(count: int = 0, **changes: Any) -> Run:
    return Run(
        **{"problem": "p", "optimizer": "sgd", "rate": 1e-3, "seed": 0, "points": _points(count), **changes}
    )


def test_run_folders_never_replace_each_other(tmp_path: Path) -> None:
    assert len({RunFolder.create(tmp_path, "demo").path for _ in range(3)}) == 3


def _make_many(parent: Path, start: Any, made: Any) -> None:
    start.wait()
    made.put([str(RunFolder.create(parent, "x").path) for _ in range(50)])


def test_processes_that_begin_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, made = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_make_many, args=(tmp_path, start, made)) for _ in range(4)]
    for process in processes:
        process.start()
    paths = [path for _ in processes for path in made.get(timeout=30)]
    for process in processes:
        process.join()
    assert len(set(paths)) == 200


def test_a_parent_that_is_a_broken_link_ends_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(OSError, match="File exists"):
        RunFolder.create(tmp_path / "link", "x")


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write("results.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(NotWritten, match=r"cannot write .*results\.json: No space left on device"):
        folder.write("results.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _logged(folder: RunFolder, run: Run, points: list[Point]) -> None:
    for point in points:
        run.points.append(point)
        folder.log(run, point)


def test_points_that_could_not_be_written_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run, path = RunFolder(tmp_path), _run(), tmp_path / "sgd-lr0.001-seed0.jsonl"
    points = _points(6)
    _logged(folder, run, points[:2])
    with monkeypatch.context() as full:
        full.setattr("minifisher_lab.training.runs._append", _half)
        full.setattr(files, "replaced", _full)
        _logged(folder, run, points[2:4])
        folder.record(run)
        with pytest.raises(NotWritten, match=r"seed0\.jsonl: No space.*seed0\.json: No space"):
            folder.write_again()
    assert capsys.readouterr().err.count("No space left on device") == 1  # said once
    _logged(folder, run, points[4:])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(6))
    folder.write_again()
    assert json.loads((tmp_path / "sgd-lr0.001-seed0.json").read_text())["points"][-1]["step"] == 3


def _half(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content[: len(content) // 2])
    _full()


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    RunFolder(tmp_path).begin({"a": 1}, CPU)
    run = _run(3, status="diverged", steps=7, seconds=0.1 + 0.2, state_bytes=5, test_loss=1 / 3)
    run.points.append(Point(3, 0.3, 3.0, math.nan, math.inf, 1.0, None))
    RunFolder(tmp_path).record(run)
    again = _run()
    assert RunFolder.reopen(tmp_path).recorded(again)
    assert (again.status, again.steps, again.seconds, again.test_loss) == ("diverged", 7, 0.1 + 0.2, 1 / 3)
    assert again.points[:3] == run.points[:3]
    assert not again.points[3].finite
    assert (
        len((tmp_path / "sgd-lr0.001-seed0.jsonl").read_text().splitlines()) == 4
    )  # written from the record


def test_the_plan_is_written_when_a_run_begins_and_must_stay_the_same(tmp_path: Path) -> None:
    RunFolder(tmp_path, request={"command": "train"}).begin({"budget": {"epochs": 2}, "seeds": (0, 1)}, CPU)
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["budget"] == {"epochs": 2}
    assert stored["command"] == "train"
    assert stored["device"] == "cpu"
    folder = RunFolder.reopen(tmp_path)
    folder.begin({"budget": {"epochs": 2}, "seeds": (0, 1)}, CPU)
    with pytest.raises(Unresumable, match=r"begun with seeds \[0, 1\], not \[0\]"):
        folder.begin({"budget": {"epochs": 2}, "seeds": (0,)}, CPU)


def test_a_full_disk_at_the_start_leaves_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path, "x")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(NotWritten, match=r"No space left.*Free space, or choose another folder"):
        folder.begin({}, CPU)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", '{"problem": "p"}', "[]", '{"problem": "other"}'])
def test_a_damaged_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "sgd-lr0.001-seed0.json").write_text(content)
    with pytest.raises(Unresumable, match=r"seed0\.json cannot be read .*: delete it"):
        RunFolder.reopen(tmp_path).recorded(_run())


def test_reopening_deletes_what_a_killed_process_left_and_needs_a_plan(tmp_path: Path) -> None:
    with pytest.raises(Unresumable, match=r"no run folder that can go on: it has no plan\.json"):
        RunFolder.reopen(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / f"results.json{files.part_ending().replace(str(os.getpid()), '4194304')}").write_text("half")
    RunFolder.reopen(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_in_which_another_process_works_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    program = f"""
        import pathlib, time, torch
        from minifisher_lab.training.runs import RunFolder
        folder = RunFolder.create(pathlib.Path({str(tmp_path)!r}), "x")
        folder.begin({{"seed": 1}}, torch.device("cpu"))
        print(folder.path, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        folder = RunFolder.reopen(Path(other.stdout.readline().strip()))
        with pytest.raises(Unresumable, match="is in use by another process: wait until it ends, or end it"):
            folder.begin({"seed": 1}, CPU)
        other.kill()
    for _ in range(2):  # in one process, a command may follow another
        RunFolder.reopen(folder.path).begin({"seed": 1}, CPU)


def test_a_long_name_is_a_file_name_and_a_short_one_stays(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "long")
    arguments = ",".join(f"argument_{number}=0.123456" for number in range(16))
    runs = [_run(1, optimizer=f"mbf:{arguments},last={last}") for last in "ab"]
    runs += [_run(1, optimizer="ü" * 300)]
    for run in runs:
        folder.log(run, run.points[-1])
        folder.record(run)
    folder.write_again()
    assert len(list(folder.path.glob("*.jsonl"))) == 3
    assert all(run.name.endswith("-lr0.001-seed0") for run in runs)
    short = _run(optimizer="mbf:power=(1,2)")
    assert short.name == "mbf-power=-1-2--lr0.001-seed0"


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "Free space"),
        (errno.EACCES, "Make the folder writable"),
        (errno.EROFS, "Make the folder writable"),
    ],
)
def test_the_remedy_follows_from_the_reason(number: int, cure: str) -> None:
    assert remedy(f"cannot write x: {os.strerror(number)}") == cure
