"""A loop that is divided among threads: torch's own where they can be reached, or those of a pool."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time

import pytest
import torch

from minifisher.kernels import threads
from minifisher.kernels.threads import run_parallel

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's threads are out of reach")


@pytest.fixture(params=["torch", "pool"])
def _workers(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp_region", lambda: None)


@pytest.fixture
def _two_threads():
    torch.set_num_threads(2)  # conftest.py sets the former number again


@pytest.mark.usefixtures("_workers")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_parts_cover_the_range_once(count, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    visits = torch.zeros(1000)

    def loop(start, stop):
        visits[start:stop] += 1
        return float(stop - start)

    assert run_parallel(loop, 1000, 150) == 1000
    assert (visits == 1).all()


@pytest.mark.usefixtures("_workers", "_two_threads")
def test_both_threads_work():
    seen = set()

    def loop(start, stop):
        seen.add(threading.get_ident())
        deadline = time.monotonic() + 10
        while len(seen) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        return 0.0

    run_parallel(loop, 8, 1)
    assert len(seen) == 2


@on_linux
@pytest.mark.usefixtures("_two_threads")
def test_the_threads_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(threads, "_pool", None)
    torch.rand(1_000_000).sqrt()
    before = len(os.listdir("/proc/self/task"))
    assert run_parallel(lambda start, stop: float(stop - start), 8, 1) == 8
    assert len(os.listdir("/proc/self/task")) == before


@pytest.mark.usefixtures("_workers", "_two_threads")
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_part_is_raised(kind):
    def loop(start, stop):
        if start <= 5 < stop:
            raise kind("part")
        return 0.0

    with pytest.raises(kind, match="part"):
        run_parallel(loop, 8, 1)
    assert run_parallel(lambda start, stop: 1.0, 8, 1) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("_workers", "_two_threads")
@pytest.mark.parametrize("is_imported_anew", [False, True])
def test_a_forked_process_has_threads_of_its_own(is_imported_anew):
    assert run_parallel(lambda start, stop: float(stop - start), 8, 1) == 8
    child = os.fork()
    if not child:
        if is_imported_anew:  # as where the parent process had no kernel to run
            importlib.reload(threads)
        os._exit(0 if threads.run_parallel(lambda start, stop: float(stop - start), 8, 1) == 8 else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)
