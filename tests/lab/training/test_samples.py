from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from minifisher_lab import data
from minifisher_lab.data.records import Graph, Text
from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches, samples

if TYPE_CHECKING:
    from minifisher_lab.training.samples import Splits

CPU = torch.device("cpu")


def _texts(monkeypatch: pytest.MonkeyPatch, *works: str, window: int) -> Splits:
    monkeypatch.setattr(data, "load_text", lambda name: Text(name, works))
    return batches.load(replace(PROBLEMS["gpt-shakespeare"], window=window), CPU)


def test_a_text_is_cut_into_windows_whose_targets_are_the_next_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(samples, "HELD_OUT", 4)
    splits = _texts(monkeypatch, "abcdefgh", "badcfehg", window=3)
    letters = "abcdefgh"
    assert ["".join(letters[i] for i in window) for window in splits.train.inputs] == ["abc", "def", "bad"]
    assert ["".join(letters[i] for i in window) for window in splits.train.targets] == ["bcd", "efb", "adc"]
    assert ["".join(letters[i] for i in window) for window in splits.test.inputs] == ["ghh"]
    assert splits.validation is None


def test_table_columns_are_standardised_by_the_training_rows() -> None:
    for name in ("mlp-tabular", "mlp-regression"):
        splits = batches.load(PROBLEMS[name], CPU)
        inputs = splits.train.inputs
        torch.testing.assert_close(inputs.mean(0), torch.zeros(inputs.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(inputs.std(0), torch.ones(inputs.shape[1]))
        assert splits.test.inputs.mean(0).abs().max() > 1e-3
    assert splits.train.targets.shape == (353, 1)
    assert splits.train.targets.mean().item() == pytest.approx(0, abs=1e-5)
    assert splits.train.targets.std(correction=0).item() == pytest.approx(1)


def test_a_citation_network_becomes_nodes_and_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.array([[1, 1], [0, 0], [0, 3], [2, 0]], np.float32)
    edges = np.array([[0, 1], [1, 2]], np.int64)
    parts = (np.array([0]), np.array([2]), np.array([3, 1]))
    graph = Graph("cora", 2, features, edges, np.array([1, 0, 1, 0]), *parts)
    monkeypatch.setattr(data, "load_graph", lambda name: graph)
    splits = batches.load(PROBLEMS["gcn-cora"], CPU)
    assert splits.graph is not None
    assert splits.validation is not None
    assert splits.graph.features.tolist() == [[0.5, 0.5], [0, 0], [0, 1], [1, 0]]
    assert splits.graph.places.tolist() == [0, 1, 5, 6]
    assert splits.test.inputs.tolist() == [3, 1]
    assert splits.test.targets.tolist() == [0, 0]
    assert splits.validation.targets.tolist() == [1]
    third = 6**-0.5
    expected = [[1 / 2, third, 0, 0], [third, 1 / 3, third, 0], [0, third, 1 / 2, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(splits.graph.adjacency.to_dense(), torch.tensor(expected))
