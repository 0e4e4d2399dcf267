"""What a saved state must be to fit an optimizer: everything is checked before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.distributed.collectives import as_distributed, is_distributed, local
from minifisher.distributed.placement import whole_shape
from minifisher.options import check_options
from minifisher.stacking import initial_state
from minifisher.step.layer_stack import OF_PARAMETER_SHAPE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from minifisher.curvature import Plan
    from minifisher.distributed.placement import Seat
    from minifisher.statistics.layers import Layer

    Group = dict[str, Any]
    Entry = dict[str, Any]

FORMAT_VERSION = 1
"""Of the state dict. It stands in every parameter group, where distributed checkpoints carry it along."""

# What decides how parameters join to layers, and where counts are kept: it cannot change any more.
_FIXED = ("fold_bias", "capturable")


def merged_groups(
    groups: Sequence[Group], state_dict: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[Group]:
    """The present parameters with the saved options; an option the saved state does not know is as now."""
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
        for name in _FIXED:
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
        check_options(group)
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


def indices(groups: Sequence[Group], state_dict: Mapping[str, Any]) -> dict[Tensor, Any]:
    """The key of each parameter in the saved state: a number, or its name in a distributed checkpoint."""
    pairs = zip(groups, state_dict["param_groups"], strict=True)
    return {p: key for group, saved in pairs for p, key in zip(group["params"], saved["params"], strict=True)}


def read_entries(
    seats: Mapping[Layer, Seat],
    options: Mapping[Layer, Group],
    saved: Mapping[Any, Entry],
    keys: Mapping[Tensor, Any],
) -> dict[Tensor, Entry]:
    """The saved state of every parameter, copied to where and in the dtype in which a fresh one would be.

    A layer without a gradient so far may have none.
    """
    read: dict[Tensor, Entry] = {}
    for layer, seat in seats.items():
        found = [saved.get(keys[parameter]) for parameter in layer.parameters]
        if not any(found):
            continue
        # A schedule that lowers the momentum to 0 leaves what there was.
        momentum = options[layer]["momentum"] or any("momentum" in entry for entry in found if entry)
        fresh = _wanted(layer, seat.plan, {**options[layer], "momentum": momentum})
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
        # A dimension of rows was unfolded, so that it is cut where the parameter is.
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
    """The state of a layer cut in pieces, as distributed checkpoints want it: each knows of which whole."""
    return {
        parameter: {
            name: _whole(layer, plan, parameter, name, value) if isinstance(value, Tensor) else value
            for name, value in entries[parameter].items()
        }
        for parameter in layer.parameters
    }


def _whole(layer: Layer, plan: Plan, parameter: Tensor, name: str, held: Tensor) -> Tensor:
    if name in OF_PARAMETER_SHAPE:
        return as_distributed(held, parameter, {d: d for d in range(parameter.ndim)}, parameter.shape)
    shape, axes = whole_shape(layer, plan, name)
    rows = local(layer.weight).shape[:2]
    if len(shape) > held.ndim:
        held = held.unflatten(0, rows)  # type: ignore[no-untyped-call]
    return as_distributed(held, parameter, axes, shape)


def without_stacks(entries: Mapping[Tensor, Entry]) -> defaultdict[Tensor, Entry]:
    """The same state in tensors of their own: pickle would write the whole stack for each of its slices."""
    apart = {
        parameter: {name: v.clone() if isinstance(v, Tensor) else v for name, v in entry.items()}
        for parameter, entry in entries.items()
    }
    return defaultdict(dict, apart)
