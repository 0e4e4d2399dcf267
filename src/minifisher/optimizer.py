"""The one step loop: backward pass, statistics, curvature, direction, graft, update."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.optim: the public one imports the compiler at once

from minifisher.curvature import Plan
from minifisher.distributed import ranks as parallel
from minifisher.distributed.collectives import world_size
from minifisher.distributed.placement import Seat
from minifisher.guard import NO_CLOSURE, all_finite, check_estimators, check_warm_start
from minifisher.options import (
    Params,
    as_groups,
    check_group,
    check_groups,
    check_options,
    check_parameter,
)
from minifisher.reports import Reports
from minifisher.stacking import add_momentum, form_cohorts, initial_state
from minifisher.state.checkpoint import FORMAT_VERSION
from minifisher.statistics.capture import Captures
from minifisher.statistics.layers import Layer, layer_of, layers_of
from minifisher.statistics.records import BatchGradient, LayerSamples, Secant
from minifisher.statistics.second_pass import SecondPass
from minifisher.step.adaptive_damping import ADAPT_EVERY, damping_factor, predicted_change, within_bounds
from minifisher.step.captured import check_capturable, take_step
from minifisher.step.layer_stack import SATURATED, Cohort, Move, clipped
from minifisher.step.precision import full_precision, loss_scale, overflowed, unscale

Samples = dict[Layer, LayerSamples]
Changes = list[tuple[Tensor, tuple[Any, ...]]]  # each with the ranks whose pieces add to it


class CurvatureOptimizer(Reports):
    """Base of every method: `plan` chooses a curvature for each layer, the rest is the same for all.

    A step: M <- mu M + D; direction P M with the damped inverse curvature P; its length borrowed by `graft`,
    for a weight ("adam", "sgd") or for each of its rows ("adam-rows"); W <- (1 - lr weight_decay) W - lr
    direction. With `decoupled_weight_decay=False`, weight_decay W joins D in M, not in the curvature.

    With `adaptive_damping=True` `step` needs a closure, and evaluates it once more every fifth step: the
    group's `damping` is multiplied by 0.95^5 where the loss fell by more than 3/4 of what the damped
    quadratic model predicted for that step, and divided by it where by less than 1/4 (Martens and Grosse,
    2015, Section 6.5; `minifisher.step.adaptive_damping` derives the prediction).
    """

    # GradScaler then says by how much it scaled the loss, and leaves the rest to `step`.
    _step_supports_amp_scaling = True

    folds: ClassVar[tuple[str, ...]] = ("linear",)
    """The kinds of layer whose bias `fold_bias` reads as one more input."""
    estimators: ClassVar[tuple[str, ...]] = ("gradient", "empirical", "sampled", "exact")
    """What `fisher` may be."""

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._skipped: Any = 0  # with `capturable` a tensor, as the next one
        self._fallbacks: Any = 0
        self._held = 0
        self.loss_scale: Callable[[], float] | None = None
        """Says what the loss is multiplied by; needed for "empirical" after `scaler.unscale_(optimizer)`."""
        self._layers: dict[Layer, dict[str, Any]] = {}  # each with its parameter group
        self._plans: dict[Layer, Plan] = {}
        self._seats: dict[Layer, Seat] = {}
        self._active: list[Layer] = []
        self._cohorts: list[Cohort] = []  # of the active layers
        self._captures = Captures({}, 0)
        self._modules: list[nn.Module] = []  # their buffers are kept from a second pass
        check_options(defaults)
        self._complete = False
        base = {
            "adaptive_damping": False,
            "capturable": False,
            "shard_curvature": False,
            "format_version": FORMAT_VERSION,
        }
        super().__init__(as_groups(params), {**base, **defaults})
        check_estimators(type(self).__name__, self.estimators, self._layers)
        self._complete = True
        self._arm()

    @abstractmethod
    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """The curvature of one layer under the options of its parameter group, and why it was chosen."""

    # ---- parameters ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its "params" may be a module, and any option may differ from the defaults."""
        options = {**self.defaults, **param_group}
        check_options(options)
        check_group(param_group, self.defaults)
        if options["fisher"] not in self.estimators:
            raise ValueError(
                f"fisher of {type(self).__name__} must be one of {', '.join(map(repr, self.estimators))}, "
                f"got {options['fisher']!r}"
            )
        source = param_group["params"]
        if isinstance(source, nn.Module):
            layers = layers_of(source, self.folds if options["fold_bias"] else ())
            param_group = {**param_group, "params": list(source.parameters())}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not isinstance(source, nn.Module):
            layers = [layer_of(name, parameter) for name, parameter in self._named(group)]
        try:
            self._enrol(layers, group)
        except (TypeError, ValueError):
            self.param_groups.pop()  # a group that was refused leaves no trace
            raise
        if isinstance(source, nn.Module):
            self._modules.append(source)

    def _named(self, group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        place = f"of group {len(self.param_groups) - 1}"
        names = group.get("param_names") or [
            f"parameter {index} {place}" for index in range(len(group["params"]))
        ]
        return zip(names, group["params"], strict=True)

    def _enrol(self, layers: list[Layer], group: dict[str, Any]) -> None:
        for layer in layers:
            for parameter in layer.parameters:
                check_parameter(layer.name, parameter)
        enrolled = {**self._layers, **dict.fromkeys(layers, group)}
        if self._complete:
            check_estimators(type(self).__name__, self.estimators, enrolled)
        plans = {**self._plans, **{layer: self.plan(layer, group) for layer in layers}}
        seats = self._take_seats(plans, enrolled)
        if group["capturable"]:
            check_capturable(plans, group, all(seat.alone for seat in seats.values()))
        self._layers, self._plans, self._seats, self._active = enrolled, plans, seats, []
        self._captures = self._new_captures()
        if self._complete:
            self._arm()

    def _new_captures(self) -> Captures:
        sources: dict[str, list[Layer]] = defaultdict(list)
        for layer, group in self._layers.items():
            if self._plans[layer].curvature.needs not in (None, BatchGradient):
                sources[group["fisher"]].append(layer)
        self._captures.release()
        return Captures(sources, self.defaults["statistics_memory"])

    # ---- the step ----

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the gradients in `.grad`, or on those that `closure` computes; return its loss.

        `closure` clears the gradients, computes the loss, calls its `backward()` and returns it. Where a
        second look at the mini-batch is due it is called again after the step: `SecondPass` says what stays.
        """
        return self._step_on_device(closure) if self.defaults["capturable"] else self._step(closure)

    # Traced, it would be compiled piece by piece, for every kind of layer and every phase of the schedule.
    @_disable_dynamo
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        adapting = self._adaptation_due()
        passes = self._two_passes(closure, adapting)
        with torch.enable_grad():
            loss = passes.first() if passes is not None else closure() if closure is not None else None
        with torch.no_grad(), full_precision(self.param_groups):
            changes = self._advance(self._collect(), adapting)
        if passes is not None and changes is not None:
            self._look_again(passes, loss, changes)
        self._arm()
        return loss

    def _step_on_device(self, closure: Callable[[], Any] | None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        with torch.no_grad(), full_precision(self.param_groups):
            gradients = self._gather()
            if gradients:
                scale, overflow = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
                skipped, fallen = take_step(self._cohorts, gradients, scale, overflow)
                self._skipped.add_(skipped)
                self._fallbacks.add_(fallen)
        return loss

    # What is traced would look for the very tensors in `.grad` again, and these are new ones every time.
    @_disable_dynamo
    def _gather(self) -> list[Tensor]:
        return [cohort.gradient() for cohort in self._cohorts_of(self._with_gradients(), {})]

    def _advance(self, samples: Samples, predicting: bool) -> Changes | None:
        """Step; if `predicting`, how each cohort should change the loss; None where it was skipped."""
        if overflowed(self):
            return None
        unscale(self)
        active = self._with_gradients()
        moves = self._moves(active, samples)
        if moves is None:
            self._skip()
            return None
        bound = self.defaults.get("kl_clip")
        changes: Changes = []
        for move, scale in clipped(list(moves), bound) if bound else ((move, 1.0) for move in moves):
            if predicting:
                changes.append((predicted_change(move, scale), move.cohort.seat.groups))
            move.cohort.apply(move, scale)
            self._report(move.fallen, move.held)
            self._keep_counts(move.cohort)
        return changes

    def _moves(self, active: list[Layer], samples: Samples) -> Iterable[Move] | None:
        """The step of every cohort, one after another where one process trains; None where it must not be."""
        if self._alone:
            if not all_finite(active, samples.values()):
                return None
            return (c.stride(c.gradient(), samples) for c in self._cohorts_of(active, samples))
        return parallel.moves(self._cohorts_of(active, samples), samples, all_finite(active, ()))

    @property
    def _alone(self) -> bool:
        return all(seat.alone for seat in self._seats.values())

    # ---- the second pass ----

    def _two_passes(self, closure: Callable[[], Any] | None, adapting: bool) -> SecondPass | None:
        """The two evaluations of the closure; None where one will do."""
        layers = [layer for layer in self._layers if self._plans[layer].curvature.needs is Secant]
        if closure is None:
            # torch.distributed.checkpoint makes the state by a step without a closure, of length zero.
            if (layers or self._adaptive_groups()) and any(group["lr"] != 0 for group in self.param_groups):
                raise TypeError(NO_CLOSURE.format(type(self).__name__))
            return None
        due = [layer for layer in layers if self._statistics_due(layer)]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return SecondPass(closure, parameters, self._modules, due) if due or adapting else None

    def _adaptive_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["adaptive_damping"]]

    def _adaptation_due(self) -> bool:
        taken = max((self._entry(layer).get("step", 0) for layer in self._layers), default=0)
        return taken % ADAPT_EVERY == 0 and bool(self._adaptive_groups())

    def _look_again(self, passes: SecondPass, loss: Any, changes: Changes) -> None:
        self._captures.disarm()
        loss_after = passes.second()
        with torch.no_grad(), full_precision(self.param_groups):
            secants = passes.secants(loss_scale(self, captured=False))
            if not self._alone:
                secants = parallel.mean_secants(secants)
            for cohort in self._cohorts:
                cohort.observe_secants(secants)
        if changes:
            groups = self._adaptive_groups()
            if world_size() > 1:
                loss, loss_after = parallel.mean_of((loss, loss_after))
            factor = damping_factor(loss, loss_after, parallel.total(changes), groups[0]["maximize"])
            for group in groups:
                group["damping"] = within_bounds(group["damping"] * factor)

    def observe(self, outputs: Tensor, likelihood: str = "categorical") -> None:
        """Draw labels from the model's own prediction and run the extra backward pass, when one is due.

        Call it between the forward pass and `loss.backward()`; every `.grad` stays untouched. The outputs are
        logits with the classes last ("categorical"), logits ("bernoulli") or means ("gaussian").
        """
        self._captures.draw_labels(outputs, likelihood)

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
        self._count_anew(0)
        taken = [self._warm_up(model, batch, loss, likelihood) for batch in loader]
        self.zero_grad()
        check_warm_start(taken)
        self._count_anew(SATURATED)
        self._arm()

    def _count_anew(self, observations: int) -> None:
        """So many from now on for every layer that was observed."""
        for layer in self._layers:
            entry = self._entry(layer)
            if entry.get("observations"):
                entry["observations"] = 0 * entry["observations"] + observations
        self._active = []

    def _warm_up(self, model: Any, batch: tuple[Any, Any], loss: Any, likelihood: str) -> bool:
        """Whether the batch was averaged in."""
        inputs, targets = batch
        self._arm(always=True)
        self.zero_grad()
        with torch.enable_grad():
            outputs = model(inputs)
            self.observe(outputs, likelihood)
            loss(outputs, targets).backward()
        with full_precision(self.param_groups):
            samples, active = self._collect(), self._with_gradients()
            finite = all_finite(active, samples.values())
            cohorts = self._cohorts_of(active, samples)
            if not (taken := parallel.warm_up(cohorts, samples, finite)):
                self._skip()
        for cohort in cohorts:
            self._keep_counts(cohort)
        return taken

    # ---- statistics ----

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what the backward passes so far told of samples is forgotten with their gradients."""
        super().zero_grad(set_to_none)
        self._captures.forget_backward()

    def _arm(self, always: bool = False) -> None:
        """Put hooks on when the coming step reads statistics, off when it does not."""
        self._captures.arm(lambda layer: always or self._statistics_due(layer))

    def _statistics_due(self, layer: Layer) -> bool:
        taken: int = self._entry(layer).get("step", 0)
        return taken % self._plans[layer].statistics_every == 0

    def _collect(self) -> Samples:
        return self._captures.collect(lambda captured: loss_scale(self, captured))

    # ---- cohorts ----

    def _with_gradients(self) -> list[Layer]:
        check_groups(self.param_groups, self._layers)
        return [layer for layer in self._layers if any(p.grad is not None for p in layer.parameters)]

    def _cohorts_of(self, active: list[Layer], samples: Samples) -> list[Cohort]:
        """The cohorts of the layers that have gradients; formed anew only when those change or part."""
        emptied = not all(map(self._entry, active))  # by a user who wants to start anew
        if emptied or active != self._active or any(c.is_outdated(samples) for c in self._cohorts):
            self._initialise(active)
            self._cohorts = form_cohorts(active, self._seats, self._layers, self.state, samples)
            self._active = active
            if self.defaults["capturable"]:
                self._count_on_device()
        return self._cohorts

    def _count_on_device(self) -> None:
        for cohort in self._cohorts:
            self._keep_counts(cohort)
            device = cohort.step.device
        self._skipped, self._fallbacks = (
            torch.tensor(int(count), device=device) for count in (self._skipped, self._fallbacks)
        )

    def _initialise(self, layers: Iterable[Layer]) -> None:
        for layer in layers:
            if not self._entry(layer):
                self.state.update(initial_state(layer, self._seats[layer].plan, self._layers[layer]))
            elif self._layers[layer]["momentum"]:
                add_momentum(layer, self.state)

    def _entry(self, layer: Layer) -> dict[str, Any]:
        entry: dict[str, Any] = self.state.get(layer.weight, {})  # indexing would make an empty one
        return entry

    def _keep_counts(self, cohort: Cohort) -> None:
        for layer in cohort.layers:
            self.state[layer.weight]["observations"] = cohort.observations
            for parameter in layer.parameters:
                self.state[parameter]["step"] = cohort.step
