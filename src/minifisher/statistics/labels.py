"""Random numbers for labels drawn from the model: the optimizer's own, so a resumed run draws the same.

Every draw has a generator of its own, whose seed is made of three numbers: a seed, the number of draws
before, and the rank of the process. Seed and number of draws stand in the first parameter group, so that
every kind of checkpoint keeps them. A checkpoint from before they existed has neither: labels then come from
torch's global generator, as they did then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

    Group = MutableMapping[str, Any]

SEED, DRAWS = "label_seed", "label_draws"
"""Their names in the parameter group."""

# splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). torch's
# generator for the CPU reads only the low 32 bits of its seed, so these must depend on all three numbers.
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MASK = 2**64 - 1


def begin_labels(groups: Iterable[Group]) -> None:
    """Give the first group a seed, made of torch.initial_seed, if a group draws labels and none is there."""
    groups = list(groups)
    if SEED not in groups[0] and any(group["fisher"] == "sampled" for group in groups):
        # 63 bits: a checkpoint may store it as a signed number.
        groups[0].update({SEED: mixed(torch.initial_seed()) >> 1, DRAWS: 0})


def next_generator(group: Group, rank: int, device: torch.device) -> torch.Generator | None:
    """The generator of the next draw, which is counted; None, torch's own, where the group has no seed."""
    if SEED not in group:
        return None
    seed = mixed(mixed(group[SEED] + group[DRAWS]) + rank)
    group[DRAWS] += 1
    return torch.Generator(device).manual_seed(seed)


def mixed(number: int) -> int:
    """A number of 64 bits, each of which depends on every bit of `number`: splitmix64."""
    number = (number + _INCREMENT) & _MASK
    for shift, factor in _ROUNDS:
        number = ((number ^ (number >> shift)) * factor) & _MASK
    return number ^ (number >> 31)
