"""A bias is folded in where it and the weight are frozen alike when the optimizer is made."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from minifisher import KBFGS


def train(module: nn.Module, optimizer: KBFGS, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))

        def closure(inputs: torch.Tensor = inputs) -> torch.Tensor:
            optimizer.zero_grad()
            loss = module(inputs).square().mean()
            loss.backward()
            return loss.detach()

        optimizer.step(closure)


def freeze(module: nn.Module, part: str) -> None:
    for name, parameter in module[0].named_parameters():
        parameter.requires_grad_(name != part)


def made(frozen: str, steps: int) -> tuple[nn.Module, KBFGS]:
    """A module after some steps; its first weight or bias, or neither, was frozen when all was made."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    freeze(module, frozen)
    optimizer = KBFGS(module, statistics_every=2)
    train(module, optimizer, range(steps))
    return module, optimizer


@pytest.mark.parametrize(("saved", "made_with"), [("weight", ""), ("bias", ""), ("", "weight"), ("", "bias")])
def test_a_file_is_read_by_an_optimizer_that_was_made_before_a_part_was_frozen_or_set_free(saved, made_with):
    module, optimizer = made(saved, 5)
    resumed, other = made(made_with, 0)
    freeze(resumed, saved)
    resumed.load_state_dict(copy.deepcopy(module.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained in ((module, optimizer), (resumed, other)):
        train(*trained, range(5, 11))
    assert all(map(torch.equal, module.parameters(), resumed.parameters()))


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize(
    ("freezes", "how"), [(True, "a bias by itself"), (False, "weight and bias together")]
)
def test_another_folding_is_refused_with_its_cure(part, freezes, how):
    _, optimizer = made(part if freezes else "", 5)
    _, other = made("" if freezes else part, 3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=f"read {how} where this one has 0.weight: only one of the two"):
        other.load_state_dict(optimizer.state_dict())
    assert str(other.state_dict()) == str(before)
