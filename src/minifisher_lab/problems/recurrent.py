"""A recurrent character model of Shakespeare: torch's LSTM."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from minifisher_lab.problems.problem import Problem
from minifisher_lab.problems.transformers import CHARACTERS

if TYPE_CHECKING:
    from torch import Tensor


class Lstm(nn.Module):
    """Embedding, LSTM layers (Hochreiter, Schmidhuber 1997) that start from zero, linear head."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        """Characters [N, window] to logits of the next ones [N, window, characters]."""
        logits: Tensor = self.head(self.lstm(self.characters(text))[0])
        return logits


RECURRENT = (
    Problem(
        name="lstm-shakespeare",
        description="one layer x 128, 64 characters; the loss is in nats a character",
        data="shakespeare",
        architecture=partial(Lstm, 1, 128),
        window=64,
        batch_size=16,
        epochs=0.0818,  # 400 steps
        schedule="cosine",
        warm_up=0.05,
        evaluation_samples=50,
    ),
)
