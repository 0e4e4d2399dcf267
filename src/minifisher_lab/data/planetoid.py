"""Citation networks with the public split of Planetoid (Yang, Cohen, Salakhutdinov, 2016)."""

from __future__ import annotations

import math

import numpy as np
import scipy  # imports its parts at their first use

from minifisher_lab.data import pickles
from minifisher_lab.data.archives import named
from minifisher_lab.data.records import MIB, Array, Arrays, Files, Format, WrongData

LIMIT = 64 * MIB  # the features of CiteSeer have 47 MiB
VALIDATION = 500
KINDS = {"graph": dict, "x": pickles.SparseRows, "tx": pickles.SparseRows, "allx": pickles.SparseRows}
PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")


def _decode(files: Files, name: str) -> Arrays:
    part = {key: pickles.loads(named(files, f"ind.{name}.{key}")) for key in PARTS[:-1]}
    for key, value in part.items():
        if not isinstance(value, KINDS.get(key, np.ndarray)):
            raise WrongData(f"ind.{name}.{key} holds a {type(value).__name__}")
    test = np.loadtxt(named(files, f"ind.{name}.test.index").decode().splitlines(), dtype=np.int64, ndmin=1)
    known, first_test = len(part["y"]), len(part["ally"])
    if test.min() != first_test or len(test) != len(part["ty"]):
        raise WrongData(
            f"the test index does not fit {len(part['ty'])} test nodes from number {first_test} on"
        )
    # CiteSeer's test node numbers have gaps. The missing nodes have no features and no label.
    nodes = int(test.max()) + 1
    features = np.zeros(_checked((nodes, part["allx"].state["_shape"][1])), np.float32)
    targets = np.full(nodes, -1, np.int64)
    features[:first_test], features[test] = _dense(part["allx"]), _dense(part["tx"])
    targets[:first_test], targets[test] = part["ally"].argmax(1), part["ty"].argmax(1)
    return {
        "features": features,
        "edges": _edges(part["graph"]),
        "targets": targets,
        "train": np.arange(known, dtype=np.int64),
        "validation": np.arange(known, known + VALIDATION, dtype=np.int64),
        "test": test,
    }


def _checked(shape: tuple[int, int]) -> tuple[int, int]:
    if 4 * math.prod(shape) > LIMIT:
        raise WrongData(f"features of shape {shape}, more than any of these networks has")
    return shape


def _dense(rows: pickles.SparseRows) -> Array:
    state = rows.state
    shape = _checked(state["_shape"])
    matrix = scipy.sparse.csr_matrix((state["data"], state["indices"], state["indptr"]), shape=shape)
    matrix.check_format(full_check=True)  # scipy writes to any address that a wrong index means
    return np.asarray(matrix.toarray(), np.float32)


def _edges(graph: dict[int, list[int]]) -> Array:
    """[2, E]: each undirected edge once, the lower node first, no loops."""
    pairs = {(min(a, b), max(a, b)) for a, neighbours in graph.items() for b in neighbours if a != b}
    edges: Array = np.array(sorted(pairs), np.int64).T.copy()
    return edges


def planetoid(name: str) -> Format:
    """The format of the eight files ind.NAME.*."""
    return Format(rf"ind\.{name}\.({'|'.join(PARTS)})", lambda files: _decode(files, name), LIMIT)
