"""Parameter groups: what they may hold, and whether they still hold what their layers were planned for."""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minifisher.options import NOT_IN_GROUPS
from minifisher.step.first_order import check_length

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from minifisher.options import Option

    Group = dict[str, Any]


class SeenGroup:
    """A parameter group as it was when its layers were planned."""

    def __init__(self, group: Group, options: Mapping[str, Option], module: nn.Module | None) -> None:
        self.group = group
        self.module = module
        """The module that its "params" were given as, or belong to."""
        self.parameters: list[Tensor] = list(group["params"])
        self._names = [name for name in options if name not in NOT_IN_GROUPS]
        self.look()

    def look(self) -> None:
        """Take the values of the options as seen."""
        self._values = [self.group[name] for name in self._names]
        self.tensors: dict[str, Tensor] = {
            name: value
            for name, value in zip(self._names, self._values, strict=True)
            if isinstance(value, Tensor)
        }
        """Options whose value can change in place."""

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the very parameters."""
        return len(params) == len(self.parameters) and all(map(is_, params, self.parameters))

    def still_is(self, group: Group) -> bool:
        """Whether this is the group, with the very parameters and values."""
        params = group["params"]
        return (
            group is self.group
            and len(params) == len(self.parameters)
            and all(map(is_, (*map(group.get, self._names), *params), (*self._values, *self.parameters)))
        )

    def changes(self, group: Group) -> dict[str, tuple[Any, Any]]:
        """The options that differ: name -> the value that was seen, and that of the group."""
        seen = zip(self._names, self._values, strict=True)
        pairs = {name: (value, group.get(name)) for name, value in seen}
        return {name: pair for name, pair in pairs.items() if not _same(*pair)}


def _same(seen: Any, value: Any) -> bool:
    if isinstance(seen, Tensor) or isinstance(value, Tensor):
        return seen is value
    return type(seen) is type(value) and bool(seen == value)


def check_group(method: Any, group: Group) -> None:
    """Raise ValueError for an option of a group that is out of its range for this optimizer."""
    method.check(group)
    check_length(group)
    if group["fisher"] not in method.estimators:
        raise ValueError(
            f"fisher of {type(method).__name__} must be one of {', '.join(map(repr, method.estimators))}, "
            f"got {group['fisher']!r}"
        )


def shared_options(method: Any, groups: Sequence[Group]) -> dict[str, Any]:
    """The options that are one for all groups; ValueError where the groups do not agree."""
    shared = {name: groups[0][name] for name, o in method.options.items() if not o.per_group}
    if not all(_same(group[name], value) for group in groups for name, value in shared.items()):
        for group in groups:
            method.check_shared(group, method.defaults)
    return shared


def check_fixed(options: Mapping[str, Option], changes: Mapping[str, tuple[Any, Any]], layer: str) -> None:
    """Raise ValueError where an option was changed that cannot change once the optimizer is made."""
    for name, (seen, value) in changes.items():
        if options[name].fixed or name == "shard_curvature":
            raise ValueError(
                f"{name} was changed from {seen!r} to {value!r} in the group of {layer}, and cannot change "
                "once the optimizer is made: set it back, or make a new optimizer"
            )
