"""Fetch a dataset: try each source in turn until the arrays from one pass their check."""

from __future__ import annotations

import tempfile
from pathlib import Path

from minifisher_lab import files
from minifisher_lab.data import store
from minifisher_lab.data.archives import contents
from minifisher_lab.data.progress import Progress, shown
from minifisher_lab.data.records import Arrays, DataMissing, DataUnavailable, refusing
from minifisher_lab.data.sources import SourceFailed
from minifisher_lab.data.table import Entry, Route, find


def get(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch the dataset unless it is stored already and undamaged; return where it is stored.

    The order of the sources is: files in the by-hand folder, the official files, packages. Embedded and
    generated datasets need no fetch. If every source fails, the error DataUnavailable lists what was tried.
    """
    entry = find(name)
    if not entry.routes:
        return store.folder()
    try:
        store.folder().mkdir(parents=True, exist_ok=True)
        files.remove_abandoned(store.folder())
        if _is_stored(entry):
            return store.path(name)
        with shown(progress) as report:
            return store.write(name, _fetched(entry, report))
    except OSError as error:
        raise DataUnavailable(
            f"cannot store {name} in {store.folder()}: {error.strerror or error}. "
            "Free space, or set MINIFISHER_DATA to another folder"
        ) from error


def _is_stored(entry: Entry) -> bool:
    try:
        entry.stored()
    except DataMissing:
        return False
    return True


def by_hand(name: str) -> Path:
    """The folder for files that a person has downloaded. `get` tries it first."""
    return store.folder() / "by-hand" / name


def _fetched(entry: Entry, progress: Progress) -> Arrays:
    failures = []
    local = by_hand(entry.name)
    if local.is_dir():
        try:
            return _decoded(entry, entry.routes[0], local)
        except ValueError as error:
            failures.append(f"files in {local}: {error}")
    for route in entry.routes:
        try:
            return _brought(entry, route, progress)
        except (SourceFailed, ValueError) as error:
            failures.append(f"{route.source.label}: {error}")
    raise DataUnavailable(_message(entry, failures))


def _brought(entry: Entry, route: Route, progress: Progress) -> Arrays:
    # In the cache, because the next fetch deletes there what a killed one leaves behind.
    ending = files.part_ending()
    with tempfile.TemporaryDirectory(prefix=f"{entry.name}-", suffix=ending, dir=store.folder()) as folder:
        route.source.fetch(Path(folder), progress)
        return _decoded(entry, route, Path(folder))


def _decoded(entry: Entry, route: Route, folder: Path) -> Arrays:
    with refusing("other files than expected"):
        arrays = route.format.decode(contents(folder, route.format.members, route.format.limit))
        entry.check(arrays)
        return arrays


def _message(entry: Entry, failures: list[str]) -> str:
    tried = "\n".join(f"  - {failure}" for failure in failures)
    return (
        f"no source delivered {entry.name}. Tried:\n{tried}\n"
        f"By hand: put {entry.hint} into {by_hand(entry.name)}\n"
        f"and run `minifisher data get {entry.name}` again,\n"
        f"or copy {store.path(entry.name)} from a machine that has it."
    )
