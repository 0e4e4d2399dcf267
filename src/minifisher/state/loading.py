"""What an optimizer takes over from a saved state; all is read and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from minifisher.state.checkpoint import merged_groups, parameter_keys
from minifisher.state.enrolment import Enrolment, enrol
from minifisher.state.reading import read_saved

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from minifisher.statistics.layers import Layer


class Loaded(NamedTuple):
    """Groups, layers and state as they were saved, made for the parameters of an optimizer."""

    groups: list[dict[str, Any]]
    enrolment: Enrolment
    entries: dict[Tensor, Any]
    others: dict[Any, Any]
    """Entries of the saved state that belong to no parameter, by their keys."""


def read_state_dict(method: Any, saved: Mapping[str, Any], before: Enrolment) -> Loaded:
    """Read a saved state; ValueError if it does not fit `method`, an optimizer with these layers before."""
    groups = merged_groups(method.param_groups, saved, method.defaults, type(method))
    keys, state = parameter_keys(groups, saved), saved["state"]
    # A bias is folded in where weight and bias were frozen alike when the optimizer was made.
    otherwise = _folded_otherwise(before.members, keys, state)
    kept = {layer: member for layer, member in before.members.items() if layer not in otherwise}
    enrolment = enrol(method, groups, replace(before, members=kept) if otherwise else before, {}, {})
    for layer in _folded_otherwise(enrolment.members, keys, state):
        how = "a bias by itself" if layer.bias is not None else "weight and bias together"
        raise ValueError(
            f"the saved optimizer read {how} where this one has {layer.name}: only one of the two was frozen "
            "when one of these optimizers was made; set requires_grad of both as it was then, and load again"
        )
    enrolment.begin_anew, enrolment.refresh = [], []  # all comes with the state
    is_complete = all("method" in group for group in saved["param_groups"])
    entries = read_saved(enrolment.members.values(), state, keys, is_complete)
    waiting: dict[Tensor, Any] = {p: dict(state.get(keys[p], {})) for p in enrolment.waiting}
    others = {key: state[key] for key in state.keys() - set(keys.values())}
    return Loaded(groups, enrolment, {**entries, **waiting}, others)


def _folded_otherwise(
    layers: Iterable[Layer], keys: Mapping[Tensor, Any], state: Mapping[Any, Any]
) -> dict[Layer, None]:
    """The layers whose bias is folded in here and was not in the saved state, or the other way round."""
    by_weight = {layer.weight: layer for layer in layers}
    found: dict[Layer, None] = {}
    for layer in layers:
        is_folded = layer.bias is not None
        biases: list[Any] = [layer.bias] if is_folded else [getattr(m, "bias", None) for m in layer.modules]
        for bias in filter(keys.__contains__, biases):
            own = [state.get(keys[parameter]) for parameter in (layer.weight, bias)]
            if not _fits_folding(is_folded, *(entry if isinstance(entry, Mapping) else {} for entry in own)):
                found.update(dict.fromkeys((layer, by_weight.get(bias, layer))))
    return found


def _fits_folding(is_folded: bool, weight: Mapping[str, Any], bias: Mapping[str, Any]) -> bool:
    """Whether these entries may be those of a weight with its bias folded in, or with its bias by itself."""
    if "step" not in bias:  # a bias by itself that was frozen has no state
        return not (is_folded and "step" in weight)
    return ("observations" not in bias) == is_folded  # a count that only what has its own curvature has
