"""Random numbers for labels drawn from the model: the optimizer's own, so a resumed run draws the same.

Every draw has a generator of its own, whose seed is made of three numbers: a seed, the number of draws
before, and the rank of the process. Seed and number of draws stand in the first parameter group, so that
every kind of checkpoint keeps them. A checkpoint from before they existed has neither: labels then come from
torch's global generator, as they did then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from minifisher.random_bits import random_bits

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

    Group = MutableMapping[str, Any]

SEED, DRAWS = "label_seed", "label_draws"
"""Their names in the parameter group."""


def begin_labels(groups: Iterable[Group]) -> None:
    """Give the first group a seed, made of torch.initial_seed, if a group draws labels and none is there."""
    groups = list(groups)
    if SEED not in groups[0] and any(group["fisher"] == "sampled" for group in groups):
        # 63 bits: a checkpoint may store it as a signed number.
        groups[0].update({SEED: random_bits(torch.initial_seed()) >> 1, DRAWS: 0})


def next_generator(group: Group, rank: int, device: torch.device) -> torch.Generator | None:
    """The generator of the next draw, which is counted; None, torch's own, where the group has no seed."""
    if SEED not in group:
        return None
    # torch's generator for the CPU reads only the low 32 bits: they must depend on all three numbers.
    seed = random_bits(random_bits(group[SEED] + group[DRAWS]) + rank)
    group[DRAWS] += 1
    return torch.Generator(device).manual_seed(seed)
