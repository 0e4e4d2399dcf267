"""Which layers an optimizer trains and with which plans, and whether its groups still say so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minifisher.distributed.placement import meta_state, place_layers, with_piece_units
from minifisher.options import NOT_IN_GROUPS
from minifisher.parameters import check_parameter
from minifisher.state.groups import SeenGroup, check_fixed, check_group, shared_options
from minifisher.state.reading import begin_anew, complete_entries, keep
from minifisher.statistics.estimators import check_estimators
from minifisher.statistics.layers import Layer, layers_of_tensors
from minifisher.step.captured import check_capturable
from minifisher.step.entries import has_memory, tensors_of
from minifisher.step.first_order import check_length, graft_of
from minifisher.step.layer_stack import Enrolled, with_schedules

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from minifisher.curvature import Plan
    from minifisher.options import Option

    Group = dict[str, Any]
    Changes = dict[str, tuple[Any, Any]]
    Form = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


@dataclass(eq=False)
class Enrolment:
    """The layers of an optimizer and what was decided about each, and the groups that it was decided for."""

    members: dict[Layer, Enrolled] = field(default_factory=dict)
    seen: list[SeenGroup] = field(default_factory=list)
    begin_anew: list[Layer] = field(default_factory=list)
    """Layers whose state, if there is any, may be that of another weight or structure."""
    refresh: list[Layer] = field(default_factory=list)
    """Layers whose curvature has other options than before: what it caches was computed with the old ones."""
    shared: dict[str, Any] = field(default_factory=dict)
    """The options that are one for all groups."""

    model: nn.Module | None = None
    """The module that tensors belong to which were given without one."""

    def __post_init__(self) -> None:
        self.waiting: list[Tensor] = [p for seen in self.seen for p in seen.parameters if is_lazy(p)]
        """Parameters of lazy modules, which have no shape so far."""
        parameters = [p for layer in self.members for p in layer.parameters]
        self._parameters = list(filter(has_memory, parameters))
        self._pointers = list(map(Tensor.data_ptr, self._parameters))
        self.forms: dict[Layer, Form] = {layer: form(layer) for layer in self.members}

    def names_of_waiting(self) -> Iterable[str]:
        """The names of the parameters of lazy modules, which have no shape so far."""
        for index, seen in enumerate(self.seen):
            modules = [seen.module] if seen.module is not None else []
            names = {id(p): name for module in modules for name, p in module.named_parameters()}
            yield from (names.get(id(p), name) for name, p in _named(seen, index) if is_lazy(p))

    def adapt(self, state: dict[Any, Any]) -> None:
        """Bring the state in line: what does not fit begins anew, and inverses follow changed options."""
        for layer in self.begin_anew:
            if any(map(state.get, layer.parameters)):
                keep(begin_anew(self.members[layer], state), state)
        for layer in self.refresh:
            member = self.members[layer]
            if state.get(layer.weight, {}).get("observations") and not member.group["capturable"]:
                complete_entries(member, state)
                tensors = tensors_of(state[layer.weight])
                member.placement.plan.curvature.refresh(tensors, member.group["damping"])

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that groups were given as, or belong to; each once."""
        return list(dict.fromkeys(seen.module for seen in self.seen if seen.module is not None))

    def is_current(self, groups: Sequence[Group], options: Mapping[str, Option], reads_tensors: bool) -> bool:
        """Whether nothing was planned for other groups than these: asked in every step.

        Values that a schedule may change are checked here, and ValueError is raised before anything is
        written. `reads_tensors`: whether values that are tensors may be read from their device.
        """
        if len(groups) != len(self.seen) or any(not is_lazy(p) for p in self.waiting):
            return False
        for seen, group in zip(self.seen, groups, strict=True):
            if not seen.still_is(group) and not self._follow(seen, group, options):
                return False
            if seen.tensors and reads_tensors:
                for name, value in seen.tensors.items():
                    options[name].check(value)
        # Other memory, as after an assignment to `.data`, may be of another form.
        pointers = list(map(Tensor.data_ptr, self._parameters))
        return pointers == self._pointers or self._same_forms(pointers)

    def _follow(self, seen: SeenGroup, group: Group, options: Mapping[str, Option]) -> bool:
        """Take new values of options that each step reads anew; False if something else was changed."""
        changes = seen.changes(group)
        if (
            group is not seen.group
            or not seen.holds(group["params"])
            or not all(options[name].every_step for name in changes)
        ):
            return False
        for name, (_, value) in changes.items():
            options[name].check(value)
        check_length(group)
        seen.look()
        return True

    def _same_forms(self, pointers: list[int]) -> bool:
        """Whether every weight has the shape, dtype and device that it was planned with."""
        self._pointers = pointers  # other memory alone changes nothing
        return all(form(layer) == known for layer, known in self.forms.items())


def form(layer: Layer) -> Form:
    """Shape, dtype and device of its parameters."""
    return tuple((p.shape, p.dtype, p.device) for p in layer.parameters)


def enrol(
    method: Any,
    groups: Sequence[Group],
    before: Enrolment,
    state: Mapping[Any, Any],
    given: Mapping[int, nn.Module],
) -> Enrolment:
    """Plan the layers of these groups; ValueError or TypeError, and nothing changed, where it cannot be.

    Layers that are still there keep the rank that owns them, and their plan unless an option changed.
    `method` is the optimizer; `given` holds the modules that new groups were given as, by the group's id.
    """
    seen, layers = _read_groups(method, groups, before, given)
    changes = _changes(method, layers, before)
    plans: dict[Layer, Plan] = {}
    anew: list[Layer] = []
    refresh: list[Layer] = []
    for layer, group in layers.items():
        known = before.members.get(layer)
        if known is None:
            for parameter in layer.parameters:
                check_parameter(layer.name, parameter)
        if known is None or before.forms[layer] != form(layer):
            plans[layer] = method.plan(layer, group)
            anew.append(layer)
            continue
        plans[layer] = method.plan(layer, group) if changes[layer] else known.plan
        if _steps_otherwise(known.plan, plans[layer]) or "graft" in changes[layer]:
            if _other_structure(known, plans[layer], changes[layer]):
                _check_unused(layer, changes[layer], state)
                anew.append(layer)
            refresh.append(layer)
    members = placed(method, plans, layers, before.members)
    enrolment = Enrolment(members, seen, anew, refresh, shared_options(method, groups), before.model)
    _check_readable(method, enrolment)
    if method.defaults["capturable"]:
        planned = (layers[layer] for layer in [*anew, *refresh])
        for group in {id(group): group for group in planned}.values():
            check_capturable(members.values(), group)
    return enrolment


def _read_groups(
    method: Any, groups: Sequence[Group], before: Enrolment, given: Mapping[int, nn.Module]
) -> tuple[list[SeenGroup], dict[Layer, Group]]:
    """The groups as seen now, and every layer with its group."""
    known_groups = {id(seen.group): seen for seen in before.seen}
    known = {id(p): layer for layer in before.members for p in layer.parameters}
    read: list[SeenGroup] = []
    layers: dict[Layer, Group] = {}
    for index, group in enumerate(groups):
        seen = known_groups.get(id(group))
        if seen is None or not seen.still_is(group):
            for name in method.options.keys() - {*group, *NOT_IN_GROUPS}:  # of an older version, perhaps
                group[name] = method.defaults[name]
            check_group(method, group)
            old = seen or _predecessor(group, index, before.seen)
            module = given.get(id(group), before.model if old is None else old.module)
            seen = SeenGroup(group, method.options, module)
        read.append(seen)
        folds = method.folds if group["fold_bias"] else ()
        layers.update(dict.fromkeys(_layers_of_group(seen, index, folds, known), group))
    return read, layers


def _predecessor(group: Group, index: int, seen: Sequence[SeenGroup]) -> SeenGroup | None:
    """The group that this one took the place of."""
    held = {id(parameter) for parameter in group["params"]}
    sharing = (old for old in seen if not held.isdisjoint(map(id, old.parameters)))
    return next(sharing, seen[index] if index < len(seen) else None)


def _layers_of_group(
    seen: SeenGroup, index: int, folds: Sequence[str], known: Mapping[int, Layer]
) -> Iterable[Layer]:
    held = {id(parameter) for parameter in seen.parameters}
    ids = [key for key in map(id, seen.parameters) if key in known]
    found = {key: known[key] for key in ids if all(id(p) in held for p in known[key].parameters)}
    missing = {id(p) for p in seen.parameters if not is_lazy(p)} - found.keys()
    named = ((name, p) for name, p in _named(seen, index) if id(p) in missing)
    for layer in map(with_piece_units, layers_of_tensors(named, seen.module, folds)) if missing else ():
        found.update(dict.fromkeys(map(id, layer.parameters), layer))
    return dict.fromkeys(found[id(p)] for p in seen.parameters if id(p) in found)


def _named(seen: SeenGroup, index: int) -> Iterable[tuple[str, Tensor]]:
    parameters = seen.parameters
    names = seen.group.get("param_names") or [
        f"parameter {position} of group {index}" for position in range(len(parameters))
    ]
    return zip(names, parameters, strict=True)


def _changes(method: Any, layers: Mapping[Layer, Group], before: Enrolment) -> dict[Layer, Changes]:
    """For every layer the options that changed and that plans are made of, or that a stack is made for."""
    seen = {id(old.group): old for old in before.seen}
    compared: dict[tuple[int, int], Changes] = {}
    changes: dict[Layer, Changes] = {}
    for layer, group in layers.items():
        known = before.members.get(layer)
        if known is None:
            changes[layer] = {}
            continue
        pair = id(known.group), id(group)
        if pair not in compared:
            compared[pair] = seen[id(known.group)].changes(group)
            check_fixed(method.options, compared[pair], layer.name)
        every_step = {name for name in compared[pair] if method.options[name].every_step}
        changes[layer] = {name: pair for name, pair in compared[pair].items() if name not in every_step}
    return changes


def _steps_otherwise(before: Plan, after: Plan) -> bool:
    return (before.curvature, before.first_order) != (after.curvature, after.first_order)


def _other_structure(known: Enrolled, plan: Plan, changes: Changes) -> bool:
    """Whether the state of a layer would have other tensors, or tensors of another meaning."""
    old = known.plan
    before, after = (
        {name: t.shape for name, t in meta_state(p.curvature, known.layer).items()} for p in (old, plan)
    )
    grafts = changes.get("graft", (known.group["graft"],) * 2)
    return (
        before != after
        or (old.structure, old.blocks, old.block_size) != (plan.structure, plan.blocks, plan.block_size)
        or len({graft_of(p, {"graft": g}).state_names for p, g in zip((old, plan), grafts, strict=True)}) > 1
    )


def _check_unused(layer: Layer, changes: Changes, state: Mapping[Any, Any]) -> None:
    """Raise ValueError where a state would be lost."""
    if state.get(layer.weight, {}).get("step"):
        what = ", ".join(f"{name} from {seen!r} to {value!r}" for name, (seen, value) in changes.items())
        raise ValueError(
            f"the group of {layer.name} was changed ({what}), and the state collected so far does not fit: "
            "set it back, or make a new optimizer, which begins with a new curvature"
        )


def placed(
    method: Any, plans: Mapping[Layer, Plan], groups: Mapping[Layer, Group], members: Mapping[Layer, Enrolled]
) -> dict[Layer, Enrolled]:
    """All that was decided about each layer; `members` that are there already keep their owners."""
    owners = {layer: member.placement.owner for layer, member in members.items()}
    shards = method.defaults["shard_curvature"]
    placements = place_layers(type(method).__name__, plans, groups, shards, owners)
    placements = with_schedules(placements)
    return {layer: Enrolled(layer, groups[layer], plans[layer], placements[layer]) for layer in plans}


def _check_readable(method: Any, enrolment: Enrolment) -> None:
    """Raise ValueError where no layer can serve an estimator that a group asks for."""
    if not enrolment.waiting:
        asked = ((layer, member.group["fisher"]) for layer, member in enrolment.members.items())
        check_estimators(type(method).__name__, method.estimators, asked)
