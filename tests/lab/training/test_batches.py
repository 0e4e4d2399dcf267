from __future__ import annotations

from itertools import islice

import torch

from minifisher_lab.training.batches import Samples, batches


def _numbered(count: int) -> Samples:
    return Samples(torch.arange(float(count)).reshape(count, 1, 1, 1), torch.arange(count))


def test_an_epoch_has_every_sample_once_in_an_order_drawn_from_the_seed() -> None:
    def order(seed: int) -> list[int]:
        stream = batches(_numbered(12), 4, seed, "none")
        return torch.cat([targets for _, targets in islice(stream, 6)]).tolist()

    first = order(0)
    assert sorted(first[:12]) == sorted(first[12:]) == list(range(12))
    assert first[:12] != first[12:]
    assert first == order(0) != order(1)


def test_inputs_keep_their_targets_and_batches_are_full() -> None:
    for inputs, targets in islice(batches(_numbered(10), 4, 0, "none"), 5):
        assert len(inputs) == 4
        assert torch.equal(inputs.flatten().long(), targets)


def test_the_evaluation_slice_is_always_the_same() -> None:
    first, again = _numbered(50).slice(20), _numbered(50).slice(20)
    assert torch.equal(first.targets, again.targets)
    assert len(set(first.targets.tolist())) == 20
