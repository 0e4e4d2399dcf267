"""What an optimizer takes over from a saved state; all is read and checked before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from minifisher.state.checkpoint import merged_groups, parameter_keys
from minifisher.state.enrolment import Enrolment, enrol
from minifisher.state.reading import read_saved

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


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
    enrolment = enrol(method, groups, before, {}, {})
    enrolment.begin_anew, enrolment.refresh = [], []  # all comes with the state
    keys, state = parameter_keys(groups, saved), saved["state"]
    is_complete = all("method" in group for group in saved["param_groups"])
    entries = read_saved(enrolment.members.values(), state, keys, is_complete)
    waiting: dict[Tensor, Any] = {p: dict(state.get(keys[p], {})) for p in enrolment.waiting}
    others = {key: state[key] for key in state.keys() - set(keys.values())}
    return Loaded(groups, enrolment, {**entries, **waiting}, others)
