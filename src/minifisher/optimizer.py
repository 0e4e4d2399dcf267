"""The optimizer that torch sees: parameter groups, the step, the closure, `observe`, checkpoints, reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.optim: the public one imports the compiler at once
from torch.optim import Optimizer

from minifisher.curvature import Plan
from minifisher.distributed.collectives import world_size
from minifisher.options import CommonOptions
from minifisher.state.checkpoint import (
    FORMAT_VERSION,
    check_form,
    merged_groups,
    pack,
    parameter_keys,
    without_stacks,
)
from minifisher.state.enrolment import Enrolment, enrol, placed
from minifisher.state.groups import as_groups, check_group
from minifisher.state.reading import complete_entries, read_saved
from minifisher.state.report import Counters, Description, counts, describe_layer, layers_by_name
from minifisher.statistics.capture import Captures
from minifisher.statistics.records import BatchGradient, LayerSamples, Secant
from minifisher.statistics.second_pass import SecondPass
from minifisher.step.adaptive_damping import ADAPT_EVERY, damping_factor, within_bounds
from minifisher.step.captured import take_captured_step
from minifisher.step.entries import StateOfStacks, write
from minifisher.step.layer_stack import (
    SATURATED,
    Enrolled,
    LayerStack,
    form_stacks,
    state_of_stacks,
)
from minifisher.step.precision import all_finite, full_precision, loss_scale, unscale
from minifisher.step.recipe import Alone, StepTaken, take_step
from minifisher.step.together import Together, mean_over_ranks, mean_secants, total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from minifisher.statistics.layers import Layer

    Samples = dict[Layer, LayerSamples]


class CurvatureOptimizer(CommonOptions, Optimizer, ABC):
    """Base of every method: `plan` chooses a curvature for each layer, all else is the same for all methods.

    A step: M <- mu M + D; direction P M with the damped inverse curvature P, with the length that `graft`
    gives it; W <- (1 - lr weight_decay) W - lr direction. `minifisher.step.recipe` is the step as one page.

    With `adaptive_damping=True`, `step` needs a closure and evaluates it once more in every fifth step: the
    group's `damping` is multiplied by 0.95^5 if the loss fell by more than 3/4 of what the damped quadratic
    model predicted, and divided by it if the loss fell by less than 1/4 (Martens and Grosse, 2015, Section
    6.5; `minifisher.step.adaptive_damping` derives the prediction).
    """

    folds: ClassVar[tuple[str, ...]] = ("linear",)
    """The kinds of layer whose bias `fold_bias` reads as one more input."""
    estimators: ClassVar[tuple[str, ...]] = ("gradient", "empirical", "sampled", "exact")
    """What `fisher` may be."""

    # GradScaler then tells `step` by how much it scaled the loss, and leaves the rest to it.
    _step_supports_amp_scaling = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.loss_scale: Callable[[], float] | None = None
        """Returns the factor of the loss; needed for "empirical" after `scaler.unscale_(optimizer)`."""
        self._counters = Counters()
        self._enrolment = Enrolment()
        self._enrolled: dict[Layer, Enrolled] = {}
        self._given: dict[int, nn.Module] = {}
        """The modules that new groups were given as, by the id of the group."""
        self._stacks: list[LayerStack] = []
        self._stacked: list[Layer] | None = None
        """The layers of the stacks; None where stacks must be formed anew."""
        self._state_of_stacks = StateOfStacks({}, (), ())
        self._captures = Captures({}, 0)
        self._complete = False
        values = self.bind(arguments, options)
        params = values.pop("params")
        self.check(values)
        signed = {**values, "format_version": FORMAT_VERSION, "method": type(self).__name__}
        Optimizer.__init__(self, as_groups(params), signed)
        self._enrol()
        self._complete = True

    @abstractmethod
    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """The curvature of one layer under the options of its parameter group, and why it was chosen."""

    # ---- parameters ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its "params" may be a module, and options may differ from those of other groups."""
        check_group(self, {**self.defaults, **param_group})
        self.check_shared(param_group, self.defaults)
        source = param_group["params"]
        if isinstance(source, nn.Module):
            param_group = {**param_group, "params": list(source.parameters())}
        super().add_param_group(param_group)
        if isinstance(source, nn.Module):
            self._given[id(self.param_groups[-1])] = source
        if self._complete:  # those of the constructor are enrolled together
            try:
                self._enrol()
            except (TypeError, ValueError):
                self.param_groups.pop()  # a group that was refused leaves no trace
                raise

    def _notice(self) -> None:
        """Look at what the groups hold by now; ValueError, and nothing changed, for what they must not."""
        if not self._enrolment.is_current(self.param_groups, self.options, not self.defaults["capturable"]):
            self._enrol()

    def _enrol(self) -> None:
        """Plan and place the layers of the groups, as far as they are new or changed."""
        given, self._given = self._given, {}
        self._take_over(enrol(self, self.param_groups, self._enrolment, self.state, given))

    def _take_over(self, enrolment: Enrolment) -> None:
        """These layers from now on: stacks are made anew, and hooks where other samples are read."""
        self._enrolment, self._enrolled, self._stacked = enrolment, enrolment.members, None
        self.defaults.update(enrolment.shared)
        members = self._enrolled.items()
        self._alone = all(member.placement.alone for _, member in members)
        self._secant_layers = [layer for layer, member in members if member.plan.curvature.needs is Secant]
        layers: dict[str, list[Layer]] = {}
        for layer, member in members:
            if member.plan.curvature.needs not in (None, BatchGradient):
                layers.setdefault(member.group["fisher"], []).append(layer)
        if not self._captures.reads(layers, self.defaults["statistics_memory"]):
            self._captures.release()
            self._captures = Captures(layers, self.defaults["statistics_memory"])
        with torch.no_grad(), full_precision(self.param_groups):
            enrolment.adapt(self.state)
        self._arm()

    # ---- the step ----

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the gradients in `.grad`, or on those that `closure` computes; return its loss.

        `closure` clears the gradients, computes the loss, calls its `backward()` and returns it. If a second
        look at the mini-batch is due, it is called again after the step; `SecondPass` says what that leaves
        unchanged.
        """
        return self._step_on_device(closure) if self.defaults["capturable"] else self._step(closure)

    # Traced, it would be compiled piece by piece, for every kind of layer and every phase of the schedule.
    @_disable_dynamo
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is not None:
            self._notice()
        adaptive = [group for group in self.param_groups if group["adaptive_damping"]]
        adapts = bool(adaptive) and self._steps_taken() % ADAPT_EVERY == 0
        two_passes = self._two_passes(closure, adapts) if adaptive or self._secant_layers else None
        with torch.enable_grad():
            loss = (
                two_passes.first() if two_passes is not None else closure() if closure is not None else None
            )
        with torch.no_grad(), full_precision(self.param_groups):
            samples = self._captures.collect(partial(loss_scale, self)) if self._captures else {}
            taken = self._take_step(samples, adapts)
        if two_passes is not None and taken is not None:
            self._look_again(two_passes, loss, taken)
        if self._captures:
            self._arm()
        return loss

    def _take_step(self, samples: Samples, predicts: bool) -> StepTaken | None:
        """Step; None where it was skipped."""
        if hasattr(self, "found_inf") and not unscale(self):  # a GradScaler drives this step
            return None
        active = self._layers_with_gradients()
        # What samples other processes have seen is found out when they are averaged.
        finite = all_finite(active, samples.values() if self._alone else ())
        ranks = Alone(finite) if self._alone else Together(finite, self._cut_over(active))
        taken = None
        if finite or (isinstance(ranks, Together) and ranks.groups):
            stacks = self._restack(active, samples)
            taken = take_step(stacks, samples, ranks, self.defaults.get("kl_clip"), predicts)
        if taken is None:
            self._counters.skip()
        elif taken.fallbacks or taken.frozen:
            self._counters.add(taken.fallbacks, taken.frozen)
        return taken

    def _cut_over(self, active: list[Layer]) -> tuple[Any, ...]:
        """The groups of ranks over which the weights of these layers are cut."""
        groups = (group for layer in active for group in self._enrolled[layer].placement.groups)
        return tuple(dict.fromkeys(groups))

    def _step_on_device(self, closure: Callable[[], Any] | None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        with torch.no_grad(), full_precision(self.param_groups):
            gradients = self._gradients_of_stacks()
            if gradients:
                scale, overflow = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
                skipped, fallbacks = take_captured_step(self._stacks, gradients, scale, overflow)
                self._counters.skipped.add_(skipped)
                self._counters.fallbacks.add_(fallbacks)
        return loss

    # What is traced would look for the very tensors in `.grad` again, and these are new ones every time.
    @_disable_dynamo
    def _gradients_of_stacks(self) -> list[Tensor]:
        return [stack.gradient() for stack in self._restack(self._layers_with_gradients(), {})]

    def _layers_with_gradients(self) -> list[Layer]:
        self._notice()
        return [layer for layer in self._enrolled if any(p.grad is not None for p in layer.parameters)]

    def _restack(self, active: list[Layer], samples: Samples) -> list[LayerStack]:
        """The stacks of the layers with gradients; formed anew where those, state or samples change."""
        if (
            active != self._stacked
            or not self._state_of_stacks.still_is(self.state)
            or any(stack.must_be_rebuilt(samples) for stack in self._stacks)
        ):
            self._initialise(active)
            self._stacks = form_stacks([self._enrolled[layer] for layer in active], self.state, samples)
            self._stacked, self._state_of_stacks = active, state_of_stacks(self.state, self._stacks)
            if self.defaults["capturable"]:
                for stack in self._stacks:
                    stack.keep_counts()
                    self._counters.move_to(stack.step.device)
        return self._stacks

    def _initialise(self, layers: Iterable[Layer]) -> None:
        """Make the state of layers that have none, and read what others have written into it."""
        for layer in layers:
            complete_entries(self._enrolled[layer], self.state)

    def _entry(self, layer: Layer) -> dict[str, Any]:
        entry: dict[str, Any] = self.state.get(layer.weight, {})  # indexing would make an empty one
        return entry

    def _steps_taken(self) -> int:
        return max((self._entry(layer).get("step", 0) for layer in self._enrolled), default=0)

    # ---- the second pass ----

    def _two_passes(self, closure: Callable[[], Any] | None, adapts: bool) -> SecondPass | None:
        """The two evaluations of the closure; None where one will do."""
        if closure is None:
            # torch.distributed.checkpoint makes the state by a step without a closure, of length zero.
            if any(group["lr"] != 0 for group in self.param_groups):
                raise TypeError(
                    f"{type(self).__name__}.step() looks at the mini-batch before and after the step and "
                    "needs a closure: call optimizer.step(closure), where closure() calls "
                    "optimizer.zero_grad(), computes the loss, calls loss.backward() and returns the loss"
                )
            return None
        due = [layer for layer in self._secant_layers if self._statistics_due(layer)]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return SecondPass(closure, parameters, self._enrolment.modules, due) if due or adapts else None

    def _look_again(self, two_passes: SecondPass, loss: Any, taken: StepTaken) -> None:
        """Evaluate the closure at the new weights: observe secants, adapt the damping."""
        self._captures.disarm()
        loss_after = two_passes.second()
        with torch.no_grad(), full_precision(self.param_groups):
            secants = two_passes.secants(loss_scale(self, captured=False))
            if not self._alone:
                secants = mean_secants(secants)
            for stack in self._stacks:
                stack.observe_secants(secants)
        if taken.changes:
            groups = [group for group in self.param_groups if group["adaptive_damping"]]
            if world_size() > 1:
                loss, loss_after = mean_over_ranks((loss, loss_after))
            factor = damping_factor(loss, loss_after, total(taken.changes), groups[0]["maximize"])
            for group in groups:
                group["damping"] = within_bounds(group["damping"] * factor)

    # ---- statistics ----

    def observe(self, outputs: Tensor, likelihood: str = "categorical") -> None:
        """Draw labels from the model's own prediction and do the extra backward pass, when one is due.

        Call it between the forward pass and `loss.backward()`; no `.grad` changes. The outputs are logits
        with the classes last ("categorical"), logits ("bernoulli") or means ("gaussian").
        """
        self._captures.draw_labels(outputs, likelihood)

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the samples of the backward passes so far are forgotten with their gradients."""
        super().zero_grad(set_to_none)
        if self._captures:  # which an option may turn on or off for the coming pass
            self._notice()
        self._captures.forget_backward()

    def _arm(self, always: bool = False) -> None:
        """Switch hooks on where the coming step reads statistics, off where it does not."""
        self._captures.arm(lambda layer: always or self._statistics_due(layer))

    def _statistics_due(self, layer: Layer) -> bool:
        taken: int = self._entry(layer).get("step", 0)
        return taken % self._enrolled[layer].plan.statistics_every == 0

    @torch.no_grad()
    def warm_start(
        self,
        model: Callable[[Any], Tensor],
        loader: Iterable[tuple[Any, Any]],
        loss: Callable[[Tensor, Any], Tensor],
        likelihood: str = "categorical",
    ) -> None:
        """Average the statistics over a pass through `loader` at the present weights, all batches alike.

        `loss(model(inputs), targets)` is the mean loss of a batch. Afterwards every `.grad` is None. This is
        the published start of TNT and K-BFGS (docs/methods.md). A batch with a gradient that is not finite is
        left out and counts among `skipped_steps`. Raises ValueError where no batch is left.
        """
        self._set_observations(0)
        taken = [self._warm_up(model, batch, loss, likelihood) for batch in loader]
        self.zero_grad()
        if not any(taken):
            raise ValueError(
                "warm_start got no batch to average: the loader is empty or used up, or no gradient of its "
                "batches is finite; pass a loader that can be read from its beginning"
            )
        self._set_observations(SATURATED)
        self._arm()

    def _set_observations(self, number: int) -> None:
        """Set the number of observations of every layer that was observed."""
        for layer in self._enrolled:
            entry = self._entry(layer)
            if entry.get("observations"):
                write(entry, "observations", 0 * entry["observations"] + number)
        self._stacked = None

    def _warm_up(self, model: Any, batch: tuple[Any, Any], loss: Any, likelihood: str) -> bool:
        """Average in one batch; returns whether it was finite."""
        inputs, targets = batch
        self._arm(always=True)
        self.zero_grad()
        with torch.enable_grad():
            outputs = model(inputs)
            self.observe(outputs, likelihood)
            loss(outputs, targets).backward()
        with full_precision(self.param_groups):
            samples = self._captures.collect(partial(loss_scale, self))
            active = self._layers_with_gradients()
            finite = all_finite(active, samples.values())
            stacks = self._restack(active, samples)
            ranks = Alone(finite) if self._alone else Together.over_all_ranks(finite, stacks)
            gradients = [stack.gradient() for stack in stacks]
            decays = [1 - 1 / (int(stack.observations) + 1) for stack in stacks]  # all batches weigh alike
            taken = ranks.average_statistics(stacks, gradients, samples, decays)
            if not taken:
                self._counters.skip()
        for stack in stacks:
            stack.keep_counts()
        return taken

    # ---- reports ----

    @property
    def skipped_steps(self) -> int:
        """Steps that were not taken because a gradient was NaN or infinite."""
        return int(self._counters.skipped)

    def describe(self) -> Description:
        """What was chosen for every weight and why, and the share of the parameters each structure covers."""
        self._notice()
        rows = (
            describe_layer(layer, member.plan, member.group["fisher"])
            for layer, member in self._enrolled.items()
        )
        return Description(type(self).__name__, tuple(rows))

    def diagnostics(self) -> dict[str, Any]:
        """Counts of faults; for every weight its steps, observations and the counts of its curvature."""
        groups = [seen.group for seen in self._enrolment.seen]
        named = layers_by_name(self._enrolled.values(), groups)
        weights = {name: counts(self._entry(layer)) for name, layer in named}
        return {**self._counters.report(), "weights": weights}

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with an entry for every parameter, also if it had no gradient so far."""
        self._notice()
        self._initialise(
            layer
            for layer in self._enrolled
            if self._entry(layer) or any(parameter.requires_grad for parameter in layer.parameters)
        )
        members, groups = self._enrolled.values(), self.param_groups
        # Before the hooks of others, which then see all that will be saved.
        hook = self.register_state_dict_post_hook(
            lambda _, packed: pack(packed, members, groups, self.state), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()`; ValueError, and nothing changed, if it does not fit."""
        check_form(state_dict)
        read: list[Any] = []
        # Pre hooks of others may change what is read, and post hooks find it in place.
        before = self.register_load_state_dict_pre_hook(lambda _, given: self._read(given, read))
        after = self.register_load_state_dict_post_hook(lambda _: self._take_over_saved(*read), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _read(self, saved: dict[str, Any], read: list[Any]) -> dict[str, Any]:
        """Read groups, layers and state; what is left for torch has no state that it would cast."""
        groups = merged_groups(self.param_groups, saved, self.defaults, type(self))
        enrolment = enrol(self, groups, self._enrolment, {}, {})
        enrolment.begin_anew, enrolment.refresh = [], []  # all comes with the state
        keys = parameter_keys(groups, saved)
        is_complete = all("method" in group for group in saved["param_groups"])
        entries = read_saved(enrolment.members.values(), saved["state"], keys, is_complete)
        waiting = {p: dict(saved["state"].get(keys[p], {})) for p in enrolment.waiting}
        read.extend((groups, enrolment, {**entries, **waiting}))
        others = {key: saved["state"][key] for key in saved["state"].keys() - set(keys.values())}
        return {**saved, "state": others}

    def _take_over_saved(
        self, groups: list[dict[str, Any]], enrolment: Enrolment, entries: dict[Tensor, Any]
    ) -> None:
        self.param_groups[:] = groups
        self.state.update(entries)
        self._take_over(enrolment)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("_complete", "_counters", "loss_scale")}
        plans = [(layer, member.group, member.plan) for layer, member in self._enrolled.items()]
        seen = self._enrolment.seen
        return {
            **super().__getstate__(),
            **kept,
            "state": without_stacks(self.state),
            "_plans": plans,
            "_seen": seen,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        plans, seen = state.pop("_plans", None), state.pop("_seen", None)
        super().__setstate__(state)
        if plans is not None:  # a copy, not torch's load_state_dict
            self._captures, self._given = Captures({}, 0), {}
            groups = {layer: group for layer, group, _ in plans}
            members = placed(self, {layer: plan for layer, _, plan in plans}, groups, {})
            self._take_over(Enrolment(members, seen))
