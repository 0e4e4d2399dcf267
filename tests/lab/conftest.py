from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.helpers import one_thread

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches, epoch_times

if TYPE_CHECKING:
    from collections.abc import Iterator

    from minifisher_lab.training.batches import Splits


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _times_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What an epoch takes in a test is no news for the user."""
    monkeypatch.setattr(epoch_times, "path", lambda: tmp_path_factory.getbasetemp() / "epoch-times.json")


@pytest.fixture(scope="session")
def digits() -> Splits:
    return batches.load(PROBLEMS["autoencoder-digits"], torch.device("cpu"))
