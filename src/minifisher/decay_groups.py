"""Parameter groups by the names of parameters, for `minifisher.create`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minifisher.statistics.layers import parameters_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor, nn


def groups_by_decay(model: nn.Module, no_decay: Collection[str]) -> list[dict[str, Any]]:
    """A group that is decayed and one with `weight_decay` 0, of named parameters; an empty one is left out.

    The second group has every parameter whose name, or whose module's class, contains a word of `no_decay`.
    """
    if isinstance(no_decay, str):
        raise TypeError(f'no_decay is a collection of words, such as ("bias", "norm"), got {no_decay!r}')
    decayed: list[tuple[str, Tensor]] = []
    spared: list[tuple[str, Tensor]] = []
    for name, parameter in parameters_of(model).items():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        described = f"{name} {owner}".lower()
        is_spared = any(word.lower() in described for word in no_decay)
        (spared if is_spared else decayed).append((name, parameter))
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
