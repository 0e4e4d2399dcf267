from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional

import minifisher
from minifisher.statistics.labels import DRAWS, SEED, next_generator


def make(seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return network, minifisher.MBF(network, fisher="sampled", statistics_every=2, jitter=False, **options)


def train(network: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        data = torch.Generator().manual_seed(step)
        outputs = network(torch.randn(16, 4, generator=data))
        optimizer.zero_grad()
        optimizer.observe(outputs)
        functional.cross_entropy(outputs, torch.randint(3, (16,), generator=data)).backward()
        optimizer.step()


def test_a_resumed_run_draws_the_same_labels() -> None:
    network, optimizer = make()
    train(network, optimizer, range(3))
    saved = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    train(network, optimizer, range(3, 8))
    resumed_network, resumed = make(seed=1)
    resumed_network.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.manual_seed(17)
    train(resumed_network, resumed, range(3, 8))
    for got, wanted in zip(resumed_network.parameters(), network.parameters(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_distributed_checkpoint_keeps_the_count_of_draws(flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    network, optimizer = make()
    train(network, optimizer, range(3))
    saved = get_optimizer_state_dict(network, optimizer, options=options)
    _, fresh = twin = make(seed=1)
    set_optimizer_state_dict(*twin, optim_state_dict=saved, options=options)
    for name in (SEED, DRAWS):
        assert fresh.param_groups[0][name] == optimizer.param_groups[0][name]


def test_the_random_numbers_of_the_network_are_left_alone() -> None:
    network, optimizer = make()
    before = torch.get_rng_state()
    train(network, optimizer, range(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert optimizer.param_groups[0][DRAWS] == 2


def test_ranks_and_draws_have_different_numbers() -> None:
    drawn = {
        float(torch.rand((), generator=generator, dtype=torch.float64))
        for rank in range(8)
        for draws in range(50)
        if (generator := next_generator({SEED: 5, DRAWS: draws}, rank, torch.device("cpu"))) is not None
    }
    assert len(drawn) == 400


def test_a_checkpoint_without_a_seed_goes_on_with_torchs_generator() -> None:
    network, optimizer = make()
    train(network, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    for name in (SEED, DRAWS):
        del saved["param_groups"][0][name]
    optimizer.load_state_dict(saved)
    before = torch.get_rng_state()
    train(network, optimizer, range(2))  # statistics are due in one of the two
    assert not torch.equal(torch.get_rng_state(), before)
    assert SEED not in optimizer.param_groups[0]


def test_a_group_that_draws_labels_may_come_later() -> None:
    optimizer = minifisher.MBF(nn.Linear(2, 2))
    assert SEED not in optimizer.param_groups[0]
    optimizer.add_param_group({"params": nn.Linear(2, 2), "fisher": "sampled"})
    assert optimizer.param_groups[0][DRAWS] == 0
    assert SEED not in optimizer.param_groups[1]


def test_a_run_that_draws_no_labels_has_no_seed() -> None:
    for fisher in ("gradient", "empirical", "exact"):
        assert SEED not in minifisher.MBF(nn.Linear(2, 2), fisher=fisher).param_groups[0]
