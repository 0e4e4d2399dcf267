"""Load a dataset that is on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minifisher_lab.data import shakespeare, store
from minifisher_lab.data.records import Array, Arrays, Dataset, Graph, Table, Text
from minifisher_lab.data.table import ENTRIES, Entry, find


def load(name: str, *, seed: int = 0) -> Dataset:
    """The images, scaled to [0, 1]. `seed` is used only for curves and faces, which are drawn at random.

    Raises DataMissing if the data has not been fetched, or is no longer what was fetched.
    """
    entry = _of_kind(name, "images")
    arrays = entry.finish(_stored(entry), seed)
    return Dataset(
        name,
        entry.classes,
        _scaled(arrays["train_inputs"], entry.scale),
        arrays["train_targets"].astype(np.int64),
        _scaled(arrays["test_inputs"], entry.scale),
        arrays["test_targets"].astype(np.int64),
    )


def load_table(name: str) -> Table:
    """A table of numbers: breast-cancer or diabetes."""
    entry = _of_kind(name, "table")
    return Table(name, entry.classes, **entry.finish(_stored(entry), 0))  # type: ignore[arg-type]


def load_graph(name: str) -> Graph:
    """A citation network: cora, citeseer or pubmed."""
    entry = _of_kind(name, "graph")
    return Graph(name, entry.classes, **_stored(entry))  # type: ignore[arg-type]


def load_text(name: str) -> Text:
    """Documents: shakespeare."""
    return Text(name, shakespeare.documents(_stored(_of_kind(name, "text"))))


def kind_of(name: str) -> str:
    """images, table, graph or text: which of the functions above loads it."""
    return find(name).kind


@dataclass(frozen=True)
class Row:
    """One line of the catalogue."""

    name: str
    holds: str
    source: str
    licence: str
    present: bool  # can be loaded now, without fetching
    offline: bool  # needs no download at all


def catalogue() -> tuple[Row, ...]:
    """One row per dataset: what it holds, where it comes from, and whether it is on this machine."""
    return tuple(
        Row(
            entry.name,
            entry.holds,
            entry.source,
            entry.licence,
            not entry.routes or store.path(entry.name).exists(),
            not entry.routes,
        )
        for entry in ENTRIES
    )


LOADERS = {"images": "load", "table": "load_table", "graph": "load_graph", "text": "load_text"}


def _of_kind(name: str, kind: str) -> Entry:
    entry = find(name)
    if entry.kind != kind:
        raise ValueError(f"the kind of {name} is {entry.kind}: use data.{LOADERS[entry.kind]}({name!r})")
    return entry


def _stored(entry: Entry) -> Arrays:
    return entry.stored() if entry.routes else {}


def _scaled(inputs: Array, white: int) -> npt.NDArray[np.float32]:
    scaled: npt.NDArray[np.float32] = np.divide(inputs, np.float32(white), dtype=np.float32)
    return scaled
