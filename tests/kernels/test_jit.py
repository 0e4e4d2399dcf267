"""A cache that cannot be used, and a numba that does not work, cost a warning and time, but never the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from minifisher.kernels import choose

numba = pytest.importorskip("numba", reason="numba (extra `fast`) is not installed")
jit = pytest.importorskip("minifisher.kernels.jit")


def triple(vector):
    for i in range(vector.shape[0]):
        vector[i] *= 3


def warnings_of(kernel) -> list[str]:
    """The warnings of a call, whose result must be right."""
    vector = np.ones(3, np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel(vector)
    assert vector.tolist() == [3, 3, 3]
    return [str(warning.message) for warning in caught]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache, about which nothing was told yet."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_warned", False)
    return tmp_path / "cache"


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 64]) + data[middle + 64 :]


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: b"garbage" * 100,
    "zeros": lambda data: bytes(len(data)),
    "flipped": flip,
}


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc", "*.nb?"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_told_once_and_mended(damage, pattern, folder):
    assert not warnings_of(jit.compiled(triple))
    files = list(folder.rglob(pattern))
    assert files
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    (told,) = warnings_of(jit.compiled(triple))
    assert str(folder) in told
    assert "set NUMBA_CACHE_DIR" in told
    mended = jit.compiled(triple)
    assert not warnings_of(mended)
    assert mended.stats.cache_hits


@pytest.mark.parametrize("name", ["_save_index", "_save_data"])
def test_a_full_disk_is_told_once(name, folder, monkeypatch):
    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, name, no_space)
    (told,) = warnings_of(jit.compiled(triple))
    assert "No space left on device" in told
    assert not warnings_of(jit.compiled(triple))


def test_a_file_that_may_not_be_read_is_told_once(folder, monkeypatch):
    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_load_index", denied)
    (told,) = warnings_of(jit.compiled(triple))
    assert "Permission denied" in told


def test_a_folder_that_vanishes_is_made_again(folder):
    kernel = jit.compiled(triple)
    shutil.rmtree(folder)
    assert not warnings_of(kernel)
    assert list(folder.rglob("*.nbc"))


def test_without_any_writable_folder_kernels_are_compiled_in_memory(folder, monkeypatch):
    folder.write_text("a file where the folder would be")
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    with pytest.warns(RuntimeWarning, match="set NUMBA_CACHE_DIR"):
        kernel = jit.compiled(triple)
    assert not warnings_of(kernel)


# ---- numba itself ----


@pytest.fixture
def _untried():
    choose._numba_works.cache_clear()
    yield
    choose._numba_works.cache_clear()


@pytest.mark.usefixtures("_untried")
def test_where_numba_cannot_be_imported_torch_takes_over_and_says_so_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba.core", None)
    with pytest.warns(RuntimeWarning, match="numba is installed but does not work .* Cure:") as caught:
        found = [choose.suits_numba(torch.zeros(3)) for _ in range(2)]
    assert found == [False, False]
    assert len(caught) == 1


@pytest.mark.usefixtures("_untried")
def test_where_numba_cannot_compile_torch_takes_over(monkeypatch):
    def broken(vectors):
        raise numba.core.errors.LoweringError("cannot select")

    monkeypatch.setattr(jit, "_double", broken)
    with pytest.warns(RuntimeWarning, match="cannot select"):
        assert not choose.suits_numba(torch.zeros(3))


CHILD = """
import torch, minifisher
from minifisher.kernels import choose

torch.set_num_threads(1)
weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((300, 300), (3, 3), (8, 8, 3, 3))]
opt = minifisher.MBF(weights, conv_blocks="kernel")
for _ in range(3):
    for weight in weights:
        weight.grad = torch.linspace(-1, 1, weight.numel()).view(weight.shape)
    opt.step()
print(choose._numba_works(), *(weight.double().sum().item() for weight in weights))
"""


def run(**environment: str) -> tuple[str, list[float]]:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", CHILD]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    works, *sums = done.stdout.split()
    return works, [float(each) for each in sums]


def test_with_numba_disable_jit_torch_takes_over():
    works, sums = run()
    disabled, expected = run(NUMBA_DISABLE_JIT="1")
    assert (works, disabled) == ("True", "False")
    assert sums == pytest.approx(expected, rel=1e-6)
