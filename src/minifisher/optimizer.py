"""The optimizer that torch sees: parameter groups, the step, the closure, `observe`, checkpoints, reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.optim: the public one imports the compiler at once
from torch.optim import Optimizer

from minifisher.common_options import CommonOptions
from minifisher.curvature import Plan
from minifisher.distributed.collectives import rank
from minifisher.kernels.choose import compiled_kernels
from minifisher.parameters import as_groups, check_model
from minifisher.state.checkpoint import FORMAT_VERSION, check_form, pack, refuse_strays, without_stacks
from minifisher.state.diagnostics import StepClock, diagnostics_of_step
from minifisher.state.enrolment import Enrolment, enrol, placed
from minifisher.state.groups import check_group
from minifisher.state.loading import Loaded, read_state_dict
from minifisher.state.reading import complete_entries
from minifisher.state.report import Counters, Description, counts, describe_layer, layers_by_name
from minifisher.statistics.capture import Captures
from minifisher.statistics.labels import begin_labels, next_generator
from minifisher.statistics.layers import Layer, parameters_of
from minifisher.statistics.likelihood import drawn_labels
from minifisher.statistics.records import BatchGradient, LayerSamples, Secant
from minifisher.statistics.second_pass import SecondPass, refuse_missing_closure
from minifisher.step.adaptive_damping import ADAPT_EVERY
from minifisher.step.captured import take_captured_step
from minifisher.step.entries import StateOfStacks
from minifisher.step.layer_stack import (
    Enrolled,
    LayerStack,
    form_stacks,
    state_of_stacks,
)
from minifisher.step.loss_scale import DrivenByScaler
from minifisher.step.precision import all_finite, full_precision, loss_scale, unscale
from minifisher.step.recipe import Alone, StepTaken, take_step
from minifisher.step.together import Together, adapt_damping, mean_secants
from minifisher.step.warm_start import new_average

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Set as AbstractSet

    Samples = dict[Layer, LayerSamples]


class CurvatureOptimizer(CommonOptions, Optimizer, ABC):
    """Base of every method: `plan` chooses a curvature for each layer, all else is the same for all methods.

    A step: M <- mu M + D; N <- mu M + D with the new M (Nesterov's momentum), or N = M; the direction P N,
    with the damped inverse curvature P and the length that `graft` gives it; W <- (1 - lr weight_decay) W
    - lr direction. `minifisher.step.recipe` is the step as one page.

    With `adaptive_damping=True`, `step` needs a closure and evaluates it once more in every fifth step: the
    group's `damping` is multiplied by 0.95^5 if the loss fell by more than 3/4 of what the damped quadratic
    model predicted, and divided by it if the loss fell by less than 1/4 (Martens and Grosse, 2015, Section
    6.5; `minifisher.step.adaptive_damping` derives the prediction). Pass the module, or `model=`: without it
    the second pass updates buffers, such as those of batch norm, once more.
    """

    folds: ClassVar[tuple[str, ...]] = ("linear",)
    """The kinds of layer whose bias `fold_bias` reads as one more input."""
    estimators: ClassVar[tuple[str, ...]] = ("gradient", "empirical", "sampled", "exact")
    """What `fisher` may be."""

    _step_supports_amp_scaling = DrivenByScaler()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.loss_scale: Callable[[], float] | None = None
        """Returns the scale of the loss, for "empirical" where no torch.amp.GradScaler drives the step."""
        self._counters, self._clock = Counters(), StepClock()
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
        params, self._enrolment = values.pop("params"), Enrolment(model=values.pop("model"))
        self.check(values)
        signed = {**values, "format_version": FORMAT_VERSION, "method": type(self).__name__}
        Optimizer.__init__(self, as_groups(params), signed)
        check_model(self._enrolment.model, self.param_groups)
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
            param_group = {**param_group, "params": list(parameters_of(source).values())}
        super().add_param_group(param_group)
        if isinstance(source, nn.Module):
            self._given[id(self.param_groups[-1])] = source
        if self._complete:  # those of the constructor are enrolled together
            try:
                self._enrol()
            except (TypeError, ValueError):
                self.param_groups.pop()  # a group that was refused leaves no trace
                raise

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that were given; a second pass restores their buffers."""
        return self._enrolment.modules

    def _notice(self) -> None:
        """Look at what the groups hold by now; ValueError, and nothing changed, for what they must not."""
        if not self._enrolment.is_current(self.param_groups, self.options, not self.defaults["capturable"]):
            self._enrol()

    def _enrol(self) -> None:
        """Plan and place the layers of the groups, as far as they are new or changed."""
        given, self._given = self._given, {}
        self._take_over(enrol(self, self.param_groups, self._enrolment, self.state, given))
        begin_labels(self.param_groups)

    def _take_over(self, enrolment: Enrolment) -> None:
        """These layers from now on: stacks are made anew, and hooks where other samples are read."""
        self._enrolment, self._enrolled = enrolment, enrolment.members
        self._stacks, self._stacked = [], None
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

        Raises TypeError where the method needs a closure and gets none, RuntimeError where labels were to be
        drawn and `observe` was not called, and ValueError for an option out of its range. Nothing has changed
        then.
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
        with torch.no_grad(), full_precision(self.param_groups), self._clock.timing(self._stacks):
            samples = self._captures.collect(partial(loss_scale, self)) if self._captures.by_estimator else {}
            taken = self._take_step(samples, adapts)
        if two_passes is not None and taken is not None:
            self._look_again(two_passes, loss, taken)
        if self._captures.by_estimator:
            self._arm()
        return loss

    def _take_step(self, samples: Samples, predicts: bool) -> StepTaken | None:
        """Step; None where it was skipped."""
        if hasattr(self, "found_inf") and not unscale(self):  # a GradScaler drives this step
            return None
        active, zero = self._layers_with_gradients(), set[Layer]()
        # What samples other processes have seen is found out when they are averaged.
        finite = all_finite(active, samples.values() if self._alone else (), zero)
        if self._alone:
            taken = self._step_with(Alone(finite, zero), active, samples, predicts)
        else:
            ranks = Together.of_step(
                finite, [self._enrolled[layer] for layer in active], zero, self._statistics_due
            )
            taken = self._step_with(ranks, active, samples, predicts)
            if ranks.all_ask_for_zero:
                taken = self._step_with(ranks.knowing_zero(), active, samples, predicts)
        if taken is None:
            self._counters.skip()
        elif taken.fallbacks or taken.frozen or taken.renewed:
            self._counters.add(taken.fallbacks, taken.frozen, taken.renewed)
        return taken

    def _step_with(
        self, ranks: Alone | Together, active: list[Layer], samples: Samples, predicts: bool
    ) -> StepTaken | None:
        if not (ranks.finite or (isinstance(ranks, Together) and ranks.groups)):
            return None
        stacks = self._restack(active, samples, ranks.zero)
        return take_step(stacks, samples, ranks, self.defaults.get("kl_clip"), predicts)

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

    def _restack(
        self, active: list[Layer], samples: Samples, zero: AbstractSet[Layer] = frozenset()
    ) -> list[LayerStack]:
        """The stacks of the layers with gradients; formed anew where those, state or samples change."""
        if (
            active != self._stacked
            or not self._state_of_stacks.still_is(self.state)
            or any(s.options["momentum"] and "momentum" not in s.state for s in self._stacks)
            or ((samples or zero) and any(stack.must_split(samples, zero) for stack in self._stacks))
        ):
            self._initialise(active)
            self._stacks = form_stacks([self._enrolled[layer] for layer in active], self.state, samples, zero)
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
                refuse_missing_closure(type(self).__name__)
            return None
        due = [layer for layer in self._secant_layers if self._statistics_due(layer)]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return SecondPass(closure, parameters, self.modules, due) if due or adapts else None

    def _look_again(self, two_passes: SecondPass, loss: Any, taken: StepTaken) -> None:
        """Evaluate the closure at the new weights: observe secants, adapt the damping."""
        self._captures.disarm()
        loss_after = two_passes.second()
        with torch.no_grad(), full_precision(self.param_groups):
            secants = two_passes.secants(loss_scale(self, needed=False))
            if not self._alone:
                secants = mean_secants(secants)
            secants = {layer: secant for layer, secant in secants.items() if layer not in taken.zero}
            for stack in self._stacks:
                stack.observe_secants(secants)
            if taken.changes:
                adapt_damping(self.param_groups, loss, loss_after, taken.changes)

    # ---- statistics ----

    def observe(self, outputs: Tensor, likelihood: str = "categorical") -> None:
        """Draw labels from the model's own prediction and do the extra backward pass, when one is due.

        Call it between the forward pass and `loss.backward()`; no `.grad` changes. The outputs are logits
        [n, ..., classes] ("categorical"), logits [n, ...] ("bernoulli") or means [n, ...] ("gaussian") of n
        samples. Of a network with several outputs, observe each one once: their Fisher matrices add up.

        Raises ValueError for an unknown likelihood and for "categorical" with one class, TypeError where the
        outputs are not one floating-point tensor, and RuntimeError where no layer can be found behind them.
        """
        generator = partial(next_generator, self.param_groups[0], rank())
        self._captures.draw_labels(outputs, likelihood, generator)

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the samples of the backward passes so far are forgotten with their gradients."""
        super().zero_grad(set_to_none)
        if self._captures.by_estimator:  # which an option may turn on or off for the coming pass
            self._notice()
            self._arm()  # for layers that were frozen or are trained again since the last step
            self._captures.forget_backward()

    def _arm(self, always: bool = False) -> None:
        """Switch hooks on where the coming step reads statistics, off where it does not."""
        self._captures.arm(lambda layer: always or self._statistics_due(layer))

    def _statistics_due(self, layer: Layer) -> bool:
        # A frozen layer takes no steps: by its count, its first statistics would be due in every step.
        return layer.weight.requires_grad and self._enrolled[layer].statistics_due(self._entry(layer))

    @torch.no_grad()
    def warm_start(
        self,
        model: Callable[[Any], Tensor],
        loader: Iterable[tuple[Any, Any]],
        loss: Callable[[Tensor, Any], Tensor],
        likelihood: str = "categorical",
        labels: Literal["data", "model"] = "data",
    ) -> None:
        """Average the statistics over a pass through `loader` at the present weights, all batches alike.

        `loss(model(inputs), targets)` is the mean loss of a batch. With `labels="model"` labels drawn from
        the model's prediction under `likelihood` replace the targets: class indices for "categorical", as the
        outputs for "bernoulli" and "gaussian". Afterwards every `.grad` is None, and the next step recomputes
        the inverses. This is the published start of TNT and K-BFGS, and with `labels="model"` of MBF
        (docs/methods.md). A batch with a gradient that is not finite is left out and counts among
        `skipped_steps`. Raises ValueError where no batch is left; the averages are then as before.
        """
        if labels not in ("data", "model"):
            raise ValueError(f"labels must be one of 'data', 'model', got {labels!r}")
        try:
            with new_average(lambda: map(self._entry, self._enrolled)) as taken:
                self._stacked = None  # stacks hold the counts, too
                for batch in loader:
                    taken.append(self._warm_up(model, batch, loss, likelihood, labels == "model"))
                self.zero_grad()
        finally:
            self._stacked = None
        self._arm()

    def _warm_up(self, model: Any, batch: tuple[Any, Any], loss: Any, likelihood: str, draws: bool) -> bool:
        """Average in one batch, perhaps with drawn labels; returns whether it was finite."""
        inputs, targets = batch
        self.zero_grad()
        self._arm(always=True)
        with torch.enable_grad():
            outputs = model(inputs)
            self.observe(outputs, likelihood)
            loss(outputs, drawn_labels(outputs, likelihood) if draws else targets).backward()
        with full_precision(self.param_groups):
            samples = self._captures.collect(partial(loss_scale, self)) if self._captures.by_estimator else {}
            active, zero = self._layers_with_gradients(), set[Layer]()
            finite = all_finite(active, samples.values(), zero)
            zero = {layer for layer in zero if not self._enrolled[layer].placement.cuts}
            stacks = self._restack(active, samples, zero)
            ranks = Alone(finite) if self._alone else Together.over_all_ranks(finite, stacks)
            gradients = [stack.gradient() for stack in stacks]
            decays = [stack.decay_of_warm_start(samples, zero) for stack in stacks]
            taken = ranks.average_statistics(stacks, gradients, samples, decays)
            if not taken:
                self._counters.skip()
        for stack in stacks:
            stack.keep_counts()
        return taken

    # ---- reports ----

    @property
    def skipped_steps(self) -> int:
        """Steps that were not taken because a gradient, or the square of its norm, was NaN or infinite.

        An overflow that a torch.amp.GradScaler finds is not counted: it belongs to the search for its scale.
        """
        return int(self._counters.skipped)

    def describe(self) -> Description:
        """What was chosen for every weight and why, and the share of the parameters each structure covers."""
        self._notice()
        members = self._enrolled.values()
        rows = (describe_layer(member.layer, member.plan, member.group["fisher"]) for member in members)
        devices = dict.fromkeys(member.layer.weight.device.type for member in members)
        kernels, waiting = map(compiled_kernels, devices), self._enrolment.names_of_waiting()
        return Description(type(self).__name__, tuple(rows), tuple(kernels), tuple(waiting))

    def diagnostics(self, flat: bool = False) -> dict[str, Any]:
        """Counts of faults; for every weight its steps, observations and the counts of its curvature.

        With `flat=True`, plain numbers under the same keys for every method; docs/diagnostics.md explains
        each. Call it between `step` and `zero_grad`. It costs about as much as a step without statistics.
        """
        if flat:
            self._notice()
            step = diagnostics_of_step(self._stacks, self.param_groups)
            return {**step, **self._counters.report(), **self._clock.seconds}
        groups = [seen.group for seen in self._enrolment.seen]
        named = layers_by_name(self._enrolled.values(), groups)
        weights = {name: counts(self._entry(layer)) for name, layer in named}
        return {**self._counters.report(), "weights": weights}

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with an entry for every parameter, also if it had no gradient so far."""
        self._notice()
        with torch.inference_mode(False), torch.no_grad():  # a step cannot write to an inference tensor
            self._initialise(
                layer
                for layer in self._enrolled
                if self._entry(layer) or any(parameter.requires_grad for parameter in layer.parameters)
            )
        members, groups = self._enrolled.values(), self.param_groups
        refuse_strays(self.state, groups)
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
        read: list[Loaded] = []
        # Pre hooks of others may change what is read, and post hooks find it in place.
        before = self.register_load_state_dict_pre_hook(lambda _, given: self._read(given, read))
        after = self.register_load_state_dict_post_hook(lambda _: self._take_over_saved(*read), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _read(self, saved: dict[str, Any], read: list[Loaded]) -> dict[str, Any]:
        """Read it; what is left for torch has no state that it would cast."""
        read.append(read_state_dict(self, saved, self._enrolment))
        return {**saved, "state": read[0].others}

    def _take_over_saved(self, loaded: Loaded) -> None:
        self.param_groups[:] = loaded.groups
        self.state.update(loaded.entries)
        self._take_over(loaded.enrolment)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("_clock", "_complete", "_counters", "loss_scale")}
        plans = [(layer, member.group, member.plan) for layer, member in self._enrolled.items()]
        copied = (plans, self._enrolment.seen, self._enrolment.model)
        return {**super().__getstate__(), **kept, "state": without_stacks(self.state), "_copied": copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = state.pop("_copied", None)
        super().__setstate__(state)
        if copied is not None:  # a copy, not torch's load_state_dict
            plans, seen, model = copied
            self._captures, self._given = Captures({}, 0), {}
            groups = {layer: group for layer, group, _ in plans}
            members = placed(self, {layer: plan for layer, _, plan in plans}, groups, {})
            self._take_over(Enrolment(members, seen, model=model))
