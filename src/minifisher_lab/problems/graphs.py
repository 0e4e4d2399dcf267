"""Graph networks: the two-layer GCN of Kipf and Welling (2017) on the citation networks of Planetoid."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.nn import functional

from minifisher_lab.problems.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor


class Graph(Protocol):
    """What a graph network reads beside the numbers of its nodes."""

    @property
    def features(self) -> Tensor:
        """The features of every node, [nodes, features]."""

    @property
    def places(self) -> Tensor:
        """Where the flattened features are not 0, [K]."""

    @property
    def adjacency(self) -> Tensor:
        """D^-1/2 (A + I) D^-1/2 with the degrees D of A + I, sparse, [nodes, nodes]."""


class GraphNetwork(nn.Module):
    """Z = S dropout(relu(S dropout(X) W1^T)) W2^T, S the normalised adjacency (Kipf, Welling 2017, eq. 9).

    The samples that a curvature method sees are nodes: all nodes in the first layer, whose input is a node's
    own features, and the nodes of the loss in the second, whose input is the mean over a node's neighbours.
    """

    graph: Graph

    def __init__(self, features: int, hidden: int, classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden, bias=False)
        self.second = nn.Linear(hidden, classes, bias=False)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)

    def connect(self, graph: Graph) -> None:
        """Use this graph. It is no part of a checkpoint."""
        self.graph = graph

    def forward(self, nodes: Tensor) -> Tensor:
        """The numbers of nodes [N] to logits [N, classes]."""
        adjacency = self.graph.adjacency
        hidden = functional.relu(torch.sparse.mm(adjacency, self.first(self._features())))
        logits: Tensor = self.second(torch.sparse.mm(adjacency, self.dropout(hidden))[nodes])
        return logits

    def _features(self) -> Tensor:
        """dropout(X). Zeros stay zeros, so numbers are drawn for the rest alone: one of Cora's in 80."""
        features, places = self.graph.features, self.graph.places
        if not self.training:
            return features
        dropped = torch.zeros_like(features)
        dropped.view(-1)[places] = self.dropout(features.view(-1)[places])
        return dropped


def _problem(data: str, features: int, classes: int) -> Problem:
    return Problem(
        name=f"gcn-{data}",
        description="two-layer GCN, 16 hidden units, dropout 0.5, full batch",
        data=data,
        architecture=partial(GraphNetwork, features, 16, classes),
        likelihood="categorical",
        batch_size=20 * classes,  # the training nodes of the public split: 20 of each class
        epochs=200,
        weight_penalty={"first.weight": 5e-4},
    )


# Hidden units, dropout, decay, 200 epochs: Kipf, Welling 2017 (arXiv 1609.02907), section 5.2.
GRAPHS = (
    _problem("cora", features=1433, classes=7),
    _problem("citeseer", features=3703, classes=6),
    _problem("pubmed", features=500, classes=3),
)
