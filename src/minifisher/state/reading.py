"""Reading entries of the state: from a file, or as somebody wrote them by hand; all is checked first."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.distributed.collectives import is_distributed, local
from minifisher.step.entries import COUNTS, PARAMETER_SHAPED, Entry, add_momentum, initial_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from minifisher.curvature import Curvature, Plan
    from minifisher.statistics.layers import Layer
    from minifisher.step.layer_stack import Enrolled

    Found = Mapping[str, Any]


def read_saved(
    members: Iterable[Enrolled], saved: Mapping[Any, Any], keys: Mapping[Tensor, Any], is_complete: bool
) -> dict[Tensor, Entry]:
    """A copy of the saved state of every parameter, on the device and in the dtype that a fresh state has.

    If `is_complete`, the file has an entry for every parameter, an empty one if there was no state: a
    parameter that was frozen, say. Otherwise a layer that had no gradient so far may have none.
    """
    read: dict[Tensor, Entry] = {}
    for member in members:
        layer = member.layer
        found = [_entry_of(saved, keys[parameter], layer.name) for parameter in layer.parameters]
        if any(found):
            read.update(_read_saved_layer(member, [entry or {} for entry in found]))
        elif is_complete and None in found and any(p.requires_grad for p in layer.parameters):
            raise ValueError(f"the saved state has no entry for {layer.name}: was the file cut?")
    return read


def _entry_of(saved: Mapping[Any, Any], key: Any, name: str) -> Found | None:
    if key not in saved and str(key) in saved:
        raise ValueError(
            f"the saved state has the text {str(key)!r} where the number stands for {name}: it went through "
            "JSON; save it with torch.save"
        )
    entry = saved.get(key)
    if entry is not None and not isinstance(entry, Mapping):
        raise ValueError(f"the saved state of {name} must be a dictionary, got {type(entry).__name__}")
    return entry


def _read_saved_layer(member: Enrolled, found: Sequence[Found]) -> dict[Tensor, Entry]:
    layer, curvature = member.layer, member.placement.plan.curvature
    read = {}
    for parameter, name, wanted, entry in zip(*_layer(member, found), found, strict=True):
        for surplus in sorted(entry.keys() & (PARAMETER_SHAPED - wanted.keys())):
            raise ValueError(
                f"the saved state of {name} has {surplus!r}, which this optimizer does not keep: "
                "another method or graft saved it"
            )
        read[parameter] = _read(name, wanted, entry, parameter.device, copies=True)
        for kept in wanted:
            _check_numbers(name, kept, read[parameter][kept], layer.parameters, curvature)
    return read


def complete_entries(member: Enrolled, state: dict[Any, Any]) -> None:
    """Make the state of a layer if it has none, and read what somebody else has written into it."""
    found = [state.get(parameter) or {} for parameter in member.layer.parameters]
    if found[0].keys().isdisjoint({"step", "observations", *PARAMETER_SHAPED}):  # others may keep something
        keep(begin_anew(member, state), state)
    elif not all(isinstance(entry, Entry) and not entry.is_written for entry in found):
        keep(_read_by_hand(member, found), state)
    if member.group["momentum"]:
        add_momentum(member.layer, state)


def keep(entries: Mapping[Tensor, Entry], state: dict[Any, Any]) -> None:
    """Put entries into the state."""
    for parameter, entry in entries.items():
        held = state.get(parameter)
        if isinstance(held, Entry):  # somebody may hold it, too
            held.keep(entry, entry.names)
        else:
            state[parameter] = entry


def _read_by_hand(member: Enrolled, found: Sequence[Found]) -> dict[Tensor, Entry]:
    """The entries of a layer that somebody wrote to; tensors are taken over, not copied, where they fit."""
    fresh = initial_state(member.layer, member.placement.plan, member.group)
    return {
        parameter: _read(name, wanted, entry, parameter.device, copies=False) if entry else fresh[parameter]
        for parameter, name, wanted, entry in zip(*_layer(member, found), found, strict=True)
    }


def begin_anew(member: Enrolled, entries: Mapping[Tensor, Found]) -> dict[Tensor, Entry]:
    """The entries of a layer whose shape, dtype or structure became another: what still fits is kept.

    Momentum and second moment are kept together, the tensors of the curvature likewise; otherwise they begin
    anew, with their counts.
    """
    layer, fresh = member.layer, initial_state(member.layer, member.placement.plan, member.group)
    for parameter in layer.parameters:
        entry, new = entries.get(parameter, {}), fresh[parameter]
        shaped = new.names & PARAMETER_SHAPED
        parts = [(shaped, ["step"]), (new.names - shaped - COUNTS, ["observations", "missed"])]
        for names, counts in parts:
            if new.names.issuperset(counts) and all(_fits(new[name], entry.get(name)) for name in names):
                taken = {name: entry[name].to(new[name]) for name in names}
                new.keep({**taken, **{count: entry.get(count, new[count]) for count in counts}}, new.names)
        new.keep({name: value for name, value in entry.items() if name not in new.names}, new.names)
    return fresh


def _fits(wanted: Tensor, found: Any) -> bool:
    return isinstance(found, Tensor) and found.shape == wanted.shape


# ---- one layer ----


def _layer(
    member: Enrolled, found: Sequence[Found]
) -> tuple[tuple[Tensor, ...], list[str], list[dict[str, Any]]]:
    """The parameters of a layer, their names, and what each should have in the state."""
    layer, options = member.layer, member.group
    # If a schedule lowered the momentum to 0, its buffers are still there.
    momentum = options["momentum"] or any("momentum" in entry for entry in found)
    names = [layer.name, f"the bias folded into {layer.name}"][: len(layer.parameters)]
    return layer.parameters, names, _wanted(layer, member.placement.plan, {**options, "momentum": momentum})


def _wanted(layer: Layer, plan: Plan, options: dict[str, Any]) -> list[dict[str, Any]]:
    """A fresh state of every parameter of the layer, without memory."""
    meta = [local(parameter).detach().to("meta") for parameter in layer.parameters]
    blank = replace(layer, weight=meta[0], bias=meta[1] if len(meta) > 1 else None)
    fresh = initial_state(blank, plan, options)
    return [dict(fresh[parameter]) for parameter in meta]


def _read(name: str, wanted: Found, entry: Found, device: torch.device, *, copies: bool) -> Entry:
    if "missed" in wanted:  # earlier versions observed zero gradients, too
        entry = {"missed": 0, **entry}
    for missing in sorted(wanted.keys() - entry.keys()):
        raise ValueError(
            f"the state of {name} has no {missing!r}: load what state_dict() of an optimizer with the same "
            "arguments returned, or delete the whole entry, and it begins anew"
        )
    values = {kept: _value(name, kept, wanted[kept], entry[kept], device, copies) for kept in wanted}
    foreign = {other: value for other, value in entry.items() if other not in wanted}
    return Entry({**values, **(_moved(foreign, device) if copies else foreign)}, wanted)


def _moved(foreign: Found, device: torch.device) -> dict[str, Any]:
    """What others keep in an entry, copied; tensors on the device of the parameter, as torch.optim does."""
    copied = copy.deepcopy(dict(foreign))
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in copied.items()}


def _value(name: str, kept: str, wanted: Any, saved: Any, device: torch.device, copies: bool) -> Any:
    if not isinstance(wanted, Tensor):
        return _count(name, kept, saved)
    if isinstance(saved, Tensor) and is_distributed(saved):
        # `whole_shape` made two dimensions of the rows that stand for kernels.
        saved = local(saved)
        saved = saved.reshape(wanted.shape) if saved.numel() == wanted.numel() else saved
    if not isinstance(saved, Tensor) or saved.shape != wanted.shape:
        shape = tuple(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
        raise ValueError(
            f"{kept!r} of {name} is {shape} and must be {tuple(wanted.shape)}: it was made for a parameter "
            "of another shape or for an optimizer with other arguments"
        )
    is_plain = saved.layout == torch.strided and not (saved.is_meta or saved.is_quantized)
    same_kind = saved.dtype == wanted.dtype or (saved.is_floating_point() and wanted.is_floating_point())
    if not (is_plain and same_kind):
        raise ValueError(
            f"{kept!r} of {name} is a tensor of {saved.dtype} ({saved.layout}, {saved.device}) and "
            f"must be a dense one of {wanted.dtype}"
        )
    return saved.detach().to(device=device, dtype=wanted.dtype, copy=copies)


def _count(name: str, kept: str, saved: Any) -> int:
    if isinstance(saved, Tensor) and saved.numel() == 1 and not saved.is_floating_point():
        saved = saved.item()
    if not isinstance(saved, int) or isinstance(saved, bool) or not 0 <= saved <= sys.maxsize:
        raise ValueError(f"{kept!r} of {name} must be a whole number >= 0, got {saved!r}")
    return saved


def _check_numbers(
    name: str, kept: str, value: Any, parameters: Sequence[Tensor], curvature: Curvature
) -> None:
    """Raise ValueError for a number that no step can have left behind."""
    if not isinstance(value, Tensor):
        return
    if value.is_floating_point():
        wrong = kept not in curvature.recomputed and not bool(torch.isfinite(value).all())
    else:
        wrong = bool((value < 0).any())
    if wrong or (kept == "second_moment" and bool((value < 0).any())):
        raise ValueError(
            f"{kept!r} of {name} was saved with a number that is not finite or has the wrong sign: the file "
            "is damaged; take an earlier one, or begin with a fresh optimizer"
        )
