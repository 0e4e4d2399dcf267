"""The entries of the optimizer's state: dictionaries that note what somebody else writes into them."""

from __future__ import annotations

from collections.abc import MutableMapping
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from minifisher.distributed.collectives import local
from minifisher.distributed.placement import local_part
from minifisher.step.first_order import GRAFTS, graft_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from minifisher.curvature import Plan
    from minifisher.statistics.layers import Layer

    Options = dict[str, Any]

PARAMETER_SHAPED = frozenset({"momentum", *(name for graft in GRAFTS.values() for name in graft.state_names)})
"""Tensors of the state that the engine keeps for every parameter; all others are the curvature's."""

COUNTS = frozenset({"step", "observations", "missed"})
"""Numbers that the engine keeps: the first for every parameter, the others for every weight."""


class Entry(dict[str, Any]):
    """The state of one parameter, which notes a write to a name that the engine keeps.

    Its tensors are views of a stack. Where somebody assigns another tensor to such a name, the stack no
    longer holds the state and must be formed anew. Other names belong to whoever wrote them. Files and copies
    hold a plain dictionary.
    """

    __slots__ = ("is_written", "names")

    def __init__(self, values: Mapping[str, Any], names: Iterable[str]) -> None:
        super().__init__(values)
        self.names: frozenset[str] = frozenset(names)
        """What the engine keeps."""
        self.is_written: bool = False
        """Whether somebody else has written to one of the names since the engine last looked."""

    def keep(self, values: Mapping[str, Any], names: Iterable[str]) -> None:
        """Write as the engine: these values, of which it keeps these names, and no others that it kept."""
        names = frozenset(names)
        for surplus in self.names - names:
            dict.pop(self, surplus, None)
        dict.update(self, values)
        self.names, self.is_written = names, False

    def __setitem__(self, name: str, value: Any) -> None:
        self.is_written = self.is_written or name in self.names
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.is_written = self.is_written or name in self.names
        super().__delitem__(name)

    def __ior__(self, other: Any) -> Entry:  # type: ignore[override,misc]
        self.update(other)
        return self

    # A dict's own methods would pass by the two above.
    update: ClassVar[Callable[..., None]] = MutableMapping.update
    setdefault: ClassVar[Callable[..., Any]] = MutableMapping.setdefault
    pop: ClassVar[Callable[..., Any]] = MutableMapping.pop
    popitem: ClassVar[Callable[..., tuple[str, Any]]] = MutableMapping.popitem
    clear: ClassVar[Callable[..., None]] = MutableMapping.clear

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


write: Callable[[dict[str, Any], str, Any], None] = dict.__setitem__
"""write(entry, name, value): write as the engine, which nothing notes."""

_is_written = attrgetter("is_written")


class StateOfStacks:
    """The optimizer's state as it was when stacks were formed of it; says whether it still is that state."""

    def __init__(self, state: Mapping[Any, Any], entries: Iterable[Entry], views: Iterable[Tensor]) -> None:
        self._keys, self._values = list(state), list(state.values())
        self._entries, self._views = list(entries), list(views)
        self._pointers = list(map(Tensor.data_ptr, self._views))

    def still_is(self, state: Mapping[Any, Any]) -> bool:
        """Whether nobody has assigned another state, entry or tensor, nor other memory to a tensor."""
        return (
            len(state) == len(self._keys)
            and all(map(is_, state, self._keys))  # without hashing a tensor, which takes longer
            and all(map(is_, state.values(), self._values))
            and not any(map(_is_written, self._entries))
            # another assignment to `.data` changes where the memory of a tensor begins
            and list(map(Tensor.data_ptr, self._views)) == self._pointers
        )


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory to look at, which one on meta and a fake or distributed one have not."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


# ---- the entries of one layer ----


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, but float32 for float16, which cannot hold the square of a gradient."""
    return torch.float32 if dtype == torch.float16 else dtype


def initial_state(layer: Layer, plan: Plan, options: Options) -> dict[Tensor, Entry]:
    """The entries of a layer's parameters in the optimizer's state before the first step."""
    names = [*(["momentum"] if options["momentum"] else []), *graft_of(plan, options).state_names]
    entries: dict[Tensor, dict[str, Any]] = {
        parameter: {
            "step": _zero_count(parameter, options),
            **{
                name: torch.zeros_like(local(parameter), dtype=state_dtype(parameter.dtype)) for name in names
            },
        }
        for parameter in layer.parameters
    }
    entries[layer.weight].update(
        observations=_zero_count(layer.weight, options), missed=0, **plan.curvature.init(local_part(layer))
    )
    return {parameter: Entry(values, values) for parameter, values in entries.items()}


def add_momentum(layer: Layer, entries: Mapping[Tensor, Entry]) -> None:
    """M = 0 for a layer that had no momentum so far."""
    for parameter in layer.parameters:
        entry = entries[parameter]
        if "momentum" not in entry.names:
            zeros = torch.zeros_like(local(parameter), dtype=state_dtype(parameter.dtype))
            entry.keep({"momentum": zeros}, {*entry.names, "momentum"})


def tensors_of(entry: Entry) -> dict[str, Tensor]:
    """What the engine keeps in an entry, counts apart."""
    names = entry.names - COUNTS
    return {name: value for name, value in entry.items() if name in names}


def _zero_count(parameter: Tensor, options: Options) -> int | Tensor:
    return torch.zeros((), dtype=torch.int64, device=parameter.device) if options["capturable"] else 0
