"""Reading and writing the state of an optimizer; everything is checked before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.distributed.collectives import as_dtensor, is_distributed, local
from minifisher.distributed.placement import whole_shape
from minifisher.options import check_options
from minifisher.step.layer_stack import PARAMETER_SHAPED, initial_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from minifisher.curvature import Plan
    from minifisher.options import Option
    from minifisher.statistics.layers import Layer
    from minifisher.step.layer_stack import Enrolled

    Group = dict[str, Any]
    Entry = dict[str, Any]

FORMAT_VERSION = 1
"""Of the state dict. It is stored in every parameter group, because distributed checkpoints keep those."""


def merged_groups(
    groups: Sequence[Group],
    state_dict: Mapping[str, Any],
    defaults: Mapping[str, Any],
    options: Mapping[str, Option],
) -> list[Group]:
    """The present parameters with the saved options; an option that was not saved has its default."""
    for part in ("state", "param_groups"):
        if part not in state_dict:
            raise ValueError(f"a saved optimizer state has {part!r}, this has {sorted(map(str, state_dict))}")
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"the saved state has {len(saved)} parameter groups, the optimizer {len(groups)}")
    for index, (new, old) in enumerate(zip(saved, groups, strict=True)):
        _check_version(new, index)
        if len(new["params"]) != len(old["params"]):
            raise ValueError(
                f"group {index} has {len(new['params'])} parameters in the saved state "
                f"and {len(old['params'])} in the optimizer"
            )
        for name in (name for name, declared in options.items() if declared.fixed):
            if name in old and new.get(name, old[name]) != old[name]:
                raise ValueError(
                    f"group {index} was saved with {name}={new[name]!r}: make the optimizer with it, "
                    f"got {name}={old[name]!r}"
                )
    merged = [
        {**defaults, **new, **{name: old[name] for name in ("params", "param_names") if name in old}}
        for new, old in zip(saved, groups, strict=True)
    ]
    for group in merged:
        check_options(options, group)
    return merged


def _check_version(saved: Group, index: int) -> None:
    version = saved.get("format_version")
    if version is None:
        raise ValueError(f"group {index} of the saved state has no format_version: not saved by minifisher")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"the saved state has format_version {version} and this minifisher reads up to {FORMAT_VERSION}: "
            "upgrade minifisher"
        )


def parameter_keys(groups: Sequence[Group], state_dict: Mapping[str, Any]) -> dict[Tensor, Any]:
    """The key of each parameter in the saved state: a number, or its name in a distributed checkpoint."""
    pairs = zip(groups, state_dict["param_groups"], strict=True)
    return {p: key for group, saved in pairs for p, key in zip(group["params"], saved["params"], strict=True)}


def read_entries(
    members: Iterable[Enrolled], saved: Mapping[Any, Entry], keys: Mapping[Tensor, Any]
) -> dict[Tensor, Entry]:
    """A copy of the saved state of every parameter, on the device and in the dtype that a fresh state has.

    A layer that had no gradient so far may have no saved state.
    """
    read: dict[Tensor, Entry] = {}
    for member in members:
        layer, options = member.layer, member.group
        found = [saved.get(keys[parameter]) for parameter in layer.parameters]
        if not any(found):
            continue
        # If a schedule lowered the momentum to 0, its buffers are still there.
        momentum = options["momentum"] or any("momentum" in entry for entry in found if entry)
        fresh = _wanted(layer, member.placement.plan, {**options, "momentum": momentum})
        for parameter, name, wanted, entry in zip(layer.parameters, _names(layer), fresh, found, strict=True):
            read[parameter] = _read(name, wanted, entry or {}, parameter.device)
    return read


def _names(layer: Layer) -> list[str]:
    return [layer.name, f"the bias folded into {layer.name}"][: len(layer.parameters)]


def _wanted(layer: Layer, plan: Plan, options: Group) -> list[Entry]:
    """A fresh state of every parameter of the layer, without memory."""
    meta = [local(parameter).detach().to("meta") for parameter in layer.parameters]
    blank = replace(layer, weight=meta[0], bias=meta[1] if len(meta) > 1 else None)
    fresh = initial_state(blank, plan, options)
    return [fresh[parameter] for parameter in meta]


def _read(parameter: str, wanted: Entry, entry: Entry, device: torch.device) -> Entry:
    for missing in sorted(wanted.keys() - entry.keys()):
        raise ValueError(f"the saved state of {parameter} has no {missing!r}")
    for unknown in sorted(entry.keys() - wanted.keys()):
        raise ValueError(
            f"the saved state of {parameter} has {unknown!r}, which this optimizer does not keep: "
            "another method or graft saved it"
        )
    return {name: _value(parameter, name, wanted[name], entry[name], device) for name in wanted}


def _value(parameter: str, name: str, wanted: Any, saved: Any, device: torch.device) -> Any:
    if not isinstance(wanted, Tensor):
        return int(saved)
    if isinstance(saved, Tensor) and is_distributed(saved):
        # `whole_shape` made two dimensions of the rows that stand for kernels.
        saved = local(saved)
        saved = saved.reshape(wanted.shape) if saved.numel() == wanted.numel() else saved
    if not isinstance(saved, Tensor) or saved.shape != wanted.shape:
        shape = tuple(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
        raise ValueError(
            f"{name!r} of {parameter} was saved as {shape} and must be {tuple(wanted.shape)}: "
            "the parameter's shape or the structure chosen for it is another"
        )
    return saved.detach().to(device=device, dtype=wanted.dtype, copy=True)


def whole_entries(layer: Layer, plan: Plan, entries: Mapping[Tensor, Entry]) -> dict[Tensor, Entry]:
    """The state of a sharded layer as DTensors, which distributed checkpoints can save and reshard."""
    return {
        parameter: {
            name: _whole(layer, plan, parameter, name, value) if isinstance(value, Tensor) else value
            for name, value in entries[parameter].items()
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


def without_stacks(entries: Mapping[Tensor, Entry]) -> defaultdict[Tensor, Entry]:
    """The same state without views: pickle would write the whole stack for each view of it."""
    copied = {
        parameter: {name: v.clone() if isinstance(v, Tensor) else v for name, v in entry.items()}
        for parameter, entry in entries.items()
    }
    return defaultdict(dict, copied)
