"""Hooks that keep what a layer saw: on when statistics are due, off after; no `.grad` is ever touched."""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo  # as torch.optim: the public one imports the compiler at once
from torch.autograd.graph import GradientEdge, get_gradient_edge

from minifisher.statistics.positions import batched
from minifisher.statistics.samples import Call, CapturedSamples

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from minifisher.statistics.layers import Layer


@dataclass(eq=False)
class _Pending:
    """One call of a module, waiting for its output gradient."""

    module: nn.Module
    inputs: Tensor
    edge: GradientEdge | None
    output_gradients: tuple[Tensor, ...] = ()
    """One of the training loss, or one of each loss that was sampled."""

    def receive(self, gradients: Tensor) -> None:
        # A graph that is walked twice, once for each of two losses, hands back two terms of one gradient.
        arrived = batched(self.module, gradients.detach())
        self.output_gradients = (sum(self.output_gradients, arrived),)

    def receive_all(self, gradients: Iterable[Tensor | None]) -> None:
        """The gradients of several losses; one that does not depend on the call counts as zero."""
        batches = [None if g is None else batched(self.module, g.detach()) for g in gradients]
        arrived = next((batch for batch in batches if batch is not None), None)
        if arrived is not None:
            zeros = torch.zeros_like(arrived)
            self.output_gradients = tuple(zeros if batch is None else batch for batch in batches)
            self.edge = None


class Capture:
    """Keeps inputs and output gradients of layers between `arm` and `collect`.

    The empirical estimator reads the training loss's own backward pass; the sampled one (`sampled=True`) the
    extra one that `sample` makes. Calls of one forward pass are the same samples at other positions: a call
    that begins after an earlier one has received its gradient opens another pass, of other samples. Calls of
    one pass with different numbers of samples cannot be the same samples and count as others. A call whose
    gradient never arrives is dropped. While a capture is armed, compiled models run eagerly: compiled code
    does not see hooks that come and go, and recompiling every time would cost more.
    """

    def __init__(self, layers: Iterable[Layer], memory: int, sampled: bool = False) -> None:
        self._layers = {module: layer for layer in layers for module in layer.modules}
        self._memory = memory
        self._sampled = sampled
        self._passes: dict[Layer, list[list[_Pending]]] = defaultdict(list)
        self._release: weakref.finalize[..., Capture] | None = None

    @property
    def layers(self) -> list[Layer]:
        """The layers whose samples it reads."""
        return list(dict.fromkeys(self._layers.values()))

    @property
    def armed(self) -> bool:
        """Whether the hooks are on."""
        return self._release is not None

    @property
    def seen(self) -> bool:
        """Whether a forward pass was seen since the last `collect`."""
        return bool(self._passes)

    @_disable_dynamo
    def arm(self) -> None:
        """Hooks on."""
        if self.armed:
            return
        self._passes.clear()
        hooks = ExitStack()
        hold_compiled_models_eager()
        hooks.callback(release_compiled_models)
        for module in self._layers:
            hooks.callback(module.register_forward_hook(_ForwardHook(self), with_kwargs=True).remove)
        # Also when the optimizer is thrown away while armed.
        self._release = weakref.finalize(self, hooks.close)
        self._release.atexit = False

    @_disable_dynamo
    def disarm(self) -> None:
        """Hooks off; what was kept stays until it is collected."""
        if self._release is not None:
            self._release()
            self._release = None

    def sample(self, *loss_sums: Tensor) -> None:
        """Fills the output gradients with those of a loss *summed* over samples; the graph stays usable.

        Of several losses each is a further draw: every sample counts once for each of them.
        """
        if not self._sampled:
            raise RuntimeError("this capture reads the training loss: make it with sampled=True")
        calls = [call for passes in self._passes.values() for calls in passes for call in calls]
        pending = [call for call in calls if not call.output_gradients]
        if not pending:
            return
        edges = [call.edge for call in pending if call.edge is not None]
        gradients = [
            torch.autograd.grad(loss_sum, edges, retain_graph=True, allow_unused=True)
            for loss_sum in loss_sums
        ]
        for call, received in zip(pending, zip(*gradients, strict=True), strict=True):
            call.receive_all(received)

    def collect(self, loss_scale: float = 1.0) -> dict[Layer, CapturedSamples]:
        """What each layer saw, and forget it; a layer without a gradient is absent.

        The training loss was multiplied by `loss_scale` before its backward pass.
        """
        collected = {layer: _complete(passes) for layer, passes in self._passes.items()}
        self._passes.clear()
        return {
            layer: self._samples(layer, passes, loss_scale) for layer, passes in collected.items() if passes
        }

    def _samples(
        self, layer: Layer, passes: tuple[tuple[Call, ...], ...], loss_scale: float
    ) -> CapturedSamples:
        count = sum(calls[0].inputs.shape[0] for calls in passes)
        # NOTE autograd of a mean loss hands back g / N. Micro-batches, each with its mean loss divided by
        # their number, hand back the same: the N of all passes together.
        scale = 1.0 if self._sampled else count / loss_scale
        return CapturedSamples(layer, count, passes, scale, self._memory)

    def _keep(self, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        layer = self._layers.get(module)  # None for a replica, which no parameter of ours belongs to
        if layer is None or not (output.requires_grad and layer.weight.requires_grad and output.numel()):
            return
        # Under autocast the module computes with a copy of its input, and the original may change afterwards.
        kept = batched(module, inputs.detach().to(output.dtype))
        call = _Pending(module, kept, get_gradient_edge(output) if self._sampled else None)
        if not self._sampled:
            # A hook on the tensor also sees the gradient before a following in-place activation; one on the
            # module does not.
            output.register_hook(call.receive)  # type: ignore[no-untyped-call]
        self._open_pass(layer).append(call)

    def _open_pass(self, layer: Layer) -> list[_Pending]:
        passes = self._passes[layer]
        if not passes or any(call.output_gradients for call in passes[-1]):
            passes.append([])
        return passes[-1]


class _ForwardHook:
    """What is registered on the modules; a copy or a pickle of a module carries one that does nothing."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = weakref.ref(capture) if capture is not None else None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        capture = self._capture() if self._capture is not None else None
        if capture is not None:
            capture._keep(module, args[0] if args else kwargs["input"], output)

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[()]]:
        return (_ForwardHook, ())


def _complete(passes: list[list[_Pending]]) -> tuple[tuple[Call, ...], ...]:
    """The calls whose gradient arrived, those of the same samples and the same draw together."""
    complete: list[tuple[Call, ...]] = []
    for pending in passes:
        together: dict[tuple[int, int], list[Call]] = defaultdict(list)
        for call in pending:
            for draw, gradients in enumerate(call.output_gradients):
                together[call.inputs.shape[0], draw].append(Call(call.module, call.inputs, gradients))
        complete += [tuple(calls) for calls in together.values()]
    return tuple(complete)


_eager_holders = 0
_eager_stance = ExitStack()


def hold_compiled_models_eager() -> None:
    """Compiled models run eagerly until it is released."""
    global _eager_holders
    if not _eager_holders:
        _eager_stance.enter_context(torch.compiler.set_stance("force_eager"))
    _eager_holders += 1


def release_compiled_models() -> None:
    """The last one to release restores the stance, in whichever order captures are disarmed."""
    global _eager_holders
    _eager_holders -= 1
    if not _eager_holders:
        _eager_stance.close()
