"""Run every mutant of the source against the tests that should notice it; print the survivors.

    python tests/mutants/run.py [--jobs 2] [--distributed] [NAME ...]

A mutant is one changed place in one file. The lists are the .toml files beside this script:

    [[file]]
    path = "linalg/bfgs.py"              # under src/minifisher
    tests = ["tests/linalg/test_bfgs.py"]  # what pytest runs; a mutant may name others
    mutants = [{ name = "...", old = "text that occurs once", new = "what replaces it" }]

`equivalent = "reason"` marks a mutant that no test can notice: it is listed and not run. `distributed = true`
marks one whose tests start several processes: it runs with --distributed, or by name.

Each job has a copy of the source of its own, so that compiled kernels stay in the cache. Results are kept in
`.mutants/results.json`. A result is used again while the mutant, the source and the named tests are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import numba
import pytest

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "minifisher"
CACHE = ROOT / ".mutants"
CONTEXT = multiprocessing.get_context("forkserver")
SECONDS = 300  # a mutant that takes longer counts as noticed


@dataclass(frozen=True)
class Mutant:
    """One changed place, and the tests that should fail."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""
    distributed: bool = False

    def applied(self) -> str:
        """The text of the changed file."""
        text = (SOURCE / self.path).read_text()
        if text.count(self.old) != 1 or self.old == self.new:
            raise SystemExit(
                f"mutant {self.name}: its old text occurs {text.count(self.old)} times in {self.path}, not "
                f"once; write it anew in tests/mutants:\n{self.old}"
            )
        return text.replace(self.old, self.new)


def read_mutants() -> list[Mutant]:
    """All mutants, in the order of the lists."""
    mutants = []
    for listed in sorted(Path(__file__).parent.glob("*.toml")):
        for file in tomllib.loads(listed.read_text())["file"]:
            for entry in file["mutants"]:
                tests = tuple(entry.pop("tests", file["tests"]))
                mutants.append(Mutant(path=file["path"], tests=tests, **entry))
    names = [mutant.name for mutant in mutants]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise SystemExit(f"two mutants have the name {', '.join(sorted(doubled))}")
    return mutants


# ---- one run ----


def run_tests(
    tree: Path, tests: Iterable[str], kernels: str = "kernels", seconds: float | None = SECONDS
) -> str:
    """What the tests say of the source in `tree`: "survived", "noticed", or an error."""
    # Forked from a process that has imported torch already, which saves most of the time.
    process = CONTEXT.Process(target=_enter, args=(tree, list(tests), kernels))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "noticed"
    outcomes = {0: "survived", 1: "noticed"}
    return outcomes.get(process.exitcode) or f"error: {(tree / 'output').read_text()[-600:]}"


def _enter(tree: Path, tests: list[str], kernels: str) -> None:
    output = os.open(tree / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["PYTHONPATH"] = str(tree)  # of processes that tests start
    os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(tree / kernels)
    sys.dont_write_bytecode = True  # a stale file would hide the next mutant
    sys.path.insert(0, str(tree))
    os.chdir(ROOT)
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def run_mutant(mutant: Mutant, tree: Path) -> str:
    """Run the tests of one mutant, and restore the source."""
    file = tree / "minifisher" / mutant.path
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()
    file.write_text(mutant.applied())
    try:
        # Compiled kernels of the mutant must not replace those of the source.
        return run_tests(tree, mutant.tests, "mutated" if mutant.path.startswith("kernels/") else "kernels")
    finally:
        shutil.copy2(SOURCE / mutant.path, file)


def fresh_tree(job: int) -> Path:
    """A copy of the source for one job; files that did not change keep their compiled kernels."""
    tree = CACHE / f"tree-{job}"
    copy = tree / "minifisher"
    if copy.exists():
        for file in copy.rglob("*.py"):
            if not (SOURCE / file.relative_to(copy)).exists():
                file.unlink()
    shutil.copytree(SOURCE, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


# ---- all of them ----


class Results:
    """Results by mutant, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        self._source = _hash(*(file.read_bytes() for file in sorted(SOURCE.rglob("*.py"))))

    def get(self, key: str) -> str | None:
        """The kept result."""
        return self._kept.get(key)

    def put(self, key: str, result: str) -> None:
        """Keep a result; errors are not kept."""
        if not result.startswith("error"):
            self._kept[key] = result
            partial = self._path.with_suffix(".part")
            partial.write_text(json.dumps(self._kept, indent=0))
            partial.replace(self._path)

    def key(self, mutant: Mutant) -> str:
        """What the result of a mutant depends on."""
        return f"{mutant.name} {_hash(repr(mutant).encode(), self._source.encode(), _tests(mutant.tests))}"

    def baseline_key(self, tests: Iterable[str]) -> str:
        """What the result without a mutant depends on."""
        return f"baseline {_hash(repr(list(tests)).encode(), self._source.encode(), _tests(tests))}"


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _tests(tests: Iterable[str]) -> bytes:
    return b"\0".join((ROOT / test.partition("::")[0]).read_bytes() for test in tests)


def check_baseline(mutants: Iterable[Mutant], results: Results, tree: Path) -> None:
    """Stop where a test fails without any mutant: it would notice nothing."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    tests = [test for test in tests if "::" not in test or test.partition("::")[0] not in tests]
    key = results.baseline_key(tests)
    result = results.get(key) or run_tests(tree, tests, seconds=None)
    if result != "survived":
        raise SystemExit(f"the tests fail without a mutant: {result}")
    results.put(key, result)


def run_all(mutants: list[Mutant], jobs: int) -> dict[Mutant, str]:
    """The result of every mutant; prints each as it comes."""
    CACHE.mkdir(exist_ok=True)
    results = Results(CACHE / "results.json")
    found = {mutant: kept for mutant in mutants if (kept := results.get(results.key(mutant)))}
    waiting = [mutant for mutant in mutants if mutant not in found]
    if not waiting:
        return found
    trees: Queue[Path] = Queue()
    for job in range(jobs):
        trees.put(fresh_tree(job))
    check_baseline(waiting, results, CACHE / "tree-0")

    def run(mutant: Mutant) -> tuple[Mutant, str, float]:
        tree, start = trees.get(), time.monotonic()
        try:
            return mutant, run_mutant(mutant, tree), time.monotonic() - start
        finally:
            trees.put(tree)

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(run, mutant) for mutant in waiting]):
            mutant, result, seconds = future.result()
            found[mutant] = result
            results.put(results.key(mutant), result)
            print(f"{len(found)}/{len(mutants)} {mutant.name}: {result} ({seconds:.0f} s)", flush=True)
    return found


def chosen(mutants: list[Mutant], names: list[str], distributed: bool) -> list[Mutant]:
    """The mutants to run: those named, or all but the equivalent and the distributed ones."""
    unknown = set(names) - {mutant.name for mutant in mutants}
    if unknown:
        raise SystemExit(f"no mutant has the name {', '.join(sorted(unknown))}")
    if names:
        return [mutant for mutant in mutants if mutant.name in names]
    return [m for m in mutants if not m.equivalent and (distributed or not m.distributed)]


def main() -> None:
    """Run mutants and report; the exit status is 1 where one survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--distributed", action="store_true", help="run those that start several processes")
    options = parser.parse_args()
    mutants = read_mutants()
    for mutant in mutants:
        mutant.applied()
    os.environ["OMP_NUM_THREADS"] = "1"
    CONTEXT.set_forkserver_preload(["hypothesis", "numba", "pytest", "scipy.linalg", "torch"])
    found = run_all(chosen(mutants, options.names, options.distributed), options.jobs)
    bad = {mutant: result for mutant, result in found.items() if result != "noticed"}
    equivalent = sum(bool(mutant.equivalent) for mutant in mutants)
    print(
        f"{len(mutants)} mutants, {equivalent} equivalent, {len(found)} run, {len(bad)} survivors or errors"
    )
    for mutant, result in bad.items():
        print(f"  {mutant.name} in {mutant.path}: {result}\n    - {mutant.old}\n    + {mutant.new}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
