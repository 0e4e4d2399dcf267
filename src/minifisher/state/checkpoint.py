"""Checkpoints: which saved groups fit, and what is saved of the state."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minifisher.distributed.collectives import as_dtensor, is_distributed, local
from minifisher.distributed.placement import whole_shape
from minifisher.options import check_options
from minifisher.step.entries import PARAMETER_SHAPED, tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from minifisher.curvature import Plan
    from minifisher.options import HasOptions
    from minifisher.statistics.layers import Layer
    from minifisher.step.entries import Entry
    from minifisher.step.layer_stack import Enrolled

    Group = dict[str, Any]

FORMAT_VERSION = 1
"""Of the state dict. It is stored in every parameter group, because distributed checkpoints keep those."""


EARLIER: dict[str, Any] = {"length": "norm", "jitter": False, "output_power": 0.0, "nesterov": False}
"""Options that format 1 had not at first, and what was done then: such a run goes on as it began."""


def merged_groups(
    groups: Sequence[Group],
    state_dict: Mapping[str, Any],
    defaults: Mapping[str, Any],
    method: type[HasOptions],
) -> list[Group]:
    """The present parameters with the saved options.

    An option that was not saved is as in `EARLIER`, or has its default.
    """
    earlier = {name: value for name, value in EARLIER.items() if name in defaults}
    saved = _saved_groups(state_dict)
    if len(saved) != len(groups):
        raise ValueError(
            f"the saved state has {len(saved)} parameter groups, the optimizer {len(groups)}: "
            "make it with the same groups"
        )
    for index, (new, old) in enumerate(zip(saved, groups, strict=True)):
        _check_version(new, index)
        _check_method(new, index, method)
        if len(new["params"]) != len(old["params"]):
            raise ValueError(
                f"group {index} has {len(new['params'])} parameters in the saved state "
                f"and {len(old['params'])} in the optimizer: make it with the same groups"
            )
        for name in (name for name, declared in method.options.items() if declared.fixed):
            if name in old and new.get(name, old[name]) != old[name]:
                raise ValueError(
                    f"group {index} was saved with {name}={new[name]!r}: make the optimizer with it, "
                    f"got {name}={old[name]!r}"
                )
    # Where curvatures live is a choice of this run.
    kept = ("params", "param_names", "shard_curvature")
    merged = [
        {
            **defaults,
            **earlier,
            **copy.deepcopy(_options(new)),
            **{name: old[name] for name in kept if name in old},
        }
        for new, old in zip(saved, groups, strict=True)
    ]
    for group in merged:
        check_options(method.options, group)
    return merged


def _options(group: Group) -> Group:
    return {name: value for name, value in group.items() if name != "params"}


def check_form(state_dict: Any) -> None:
    """Raise ValueError for what is no dictionary of state and groups."""
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"a saved optimizer state is a dictionary, got {type(state_dict).__name__}: "
            "pass what state_dict() returned"
        )


def _saved_groups(state_dict: Mapping[str, Any]) -> Sequence[Group]:
    """The saved groups; ValueError where they are not such as torch makes them."""
    for part, kind in (("state", Mapping), ("param_groups", Sequence)):
        if part not in state_dict:
            raise ValueError(f"a saved optimizer state has {part!r}, this has {sorted(map(str, state_dict))}")
        if not isinstance(state_dict[part], kind):
            raise ValueError(
                f"{part!r} of the saved state must be a {kind.__name__.lower()}, "
                f"got {type(state_dict[part]).__name__}"
            )
    saved: Sequence[Group] = state_dict["param_groups"]
    for index, group in enumerate(saved):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Sequence):
            raise ValueError(f"group {index} of the saved state has no list of 'params', got {group!r}")
    times = Counter(repr(key) for group in saved for key in group["params"])
    for key, number in times.items():
        if number > 1:
            raise ValueError(f"the saved state names the parameter {key} {number} times in its groups")
    return saved


def _check_version(saved: Group, index: int) -> None:
    version = saved.get("format_version")
    if version is None:
        raise ValueError(f"group {index} of the saved state has no format_version: not saved by minifisher")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"format_version of group {index} of the saved state must be a whole number >= 1, got {version!r}"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"the saved state has format_version {version} and this minifisher reads up to {FORMAT_VERSION}: "
            "upgrade minifisher"
        )


def _check_method(saved: Group, index: int, method: type[HasOptions]) -> None:
    """Refuse what another method saved; its name is missing where an early version of the library saved."""
    names = [base.__name__ for base in method.__mro__]
    if saved.get("method", method.__name__) not in names:
        raise ValueError(
            f"group {index} of the saved state was saved by {saved['method']}, this optimizer is "
            f"{method.__name__}: load it into the same method"
        )


def parameter_keys(groups: Sequence[Group], state_dict: Mapping[str, Any]) -> dict[Tensor, Any]:
    """The key of each parameter in the saved state: a number, or its name in a distributed checkpoint."""
    pairs = zip(groups, state_dict["param_groups"], strict=True)
    keys = {p: key for group, saved in pairs for p, key in zip(group["params"], saved["params"], strict=True)}
    for key in keys.values():
        if not isinstance(key, int | str):
            raise ValueError(f"'params' of the saved groups must hold numbers or names, got {key!r}")
    return keys


def refuse_strays(state: Mapping[Any, Any], groups: Iterable[Group]) -> None:
    """Raise ValueError for the state of a parameter that is in no group, for which a file has no number."""
    held = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter in state:
        if isinstance(parameter, Tensor) and id(parameter) not in held:
            raise ValueError(
                f"optimizer.state has an entry for a parameter of shape {tuple(parameter.shape)} that is "
                "in no parameter group by now: remove it with optimizer.state.pop(parameter), or put the "
                "parameter back"
            )


def pack(
    packed: dict[str, Any],
    members: Iterable[Enrolled],
    groups: Sequence[Group],
    state: Mapping[Tensor, Entry],
) -> None:
    """Make plain entries, of sharded layers DTensors; an empty one says that a parameter has no state."""
    keys = parameter_keys(groups, packed)
    packed["state"].update({key: dict(packed["state"].get(key, {})) for key in keys.values()})
    for member in members:
        weight = member.layer.weight
        if weight in state and is_distributed(weight):
            whole = _whole_entries(member.layer, member.plan, state)
            packed["state"].update({keys[parameter]: entry for parameter, entry in whole.items()})


def _whole_entries(layer: Layer, plan: Plan, entries: Mapping[Tensor, Entry]) -> dict[Tensor, dict[str, Any]]:
    """The state of a sharded layer as DTensors, which distributed checkpoints can save and reshard."""
    return {
        parameter: dict(entries[parameter])
        | {
            name: _whole(layer, plan, parameter, name, tensor)
            for name, tensor in tensors_of(entries[parameter]).items()
        }
        for parameter in layer.parameters
    }


def _whole(layer: Layer, plan: Plan, parameter: Tensor, name: str, held: Tensor) -> Tensor:
    if name in PARAMETER_SHAPED:
        return as_dtensor(held, parameter, {d: d for d in range(parameter.ndim)}, parameter.shape)
    shape, axes = whole_shape(layer, plan, name)
    rows = local(layer.weight).shape[:2]
    if len(shape) > held.ndim:
        held = held.unflatten(0, rows)  # type: ignore[no-untyped-call]
    return as_dtensor(held, parameter, axes, shape)


def without_stacks(entries: Mapping[Any, Any]) -> defaultdict[Any, Any]:
    """The same state without views: pickle would write the whole stack for each view of it."""
    copied = {
        key: {name: v.clone() if isinstance(v, Tensor) else v for name, v in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in entries.items()
    }
    return defaultdict(dict, copied)
