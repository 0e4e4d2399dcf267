"""Numbers around a step: finite gradients, the scale of the loss, and full precision."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.distributed.collectives import local
from minifisher.step.loss_scale import scale_of_driver
from minifisher.without_values import UsualAnswers, has_no_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.optim import Optimizer

    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples


def all_finite(
    layers: Iterable[Layer], samples: Iterable[LayerSamples], zero: set[Layer] | None = None
) -> bool:
    """Whether every gradient is finite, and its square too, since the curvature averages squares.

    `zero` receives the layers whose gradient is zero, here on this process.
    """
    gradients: dict[torch.device, list[Tensor]] = defaultdict(list)
    owners: dict[torch.device, list[Layer]] = defaultdict(list)
    for layer in layers:
        for parameter in layer.parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout != torch.strided:
                raise TypeError(
                    f"{layer.name} has a sparse gradient ({gradient.layout}): use Embedding(sparse=False), "
                    "or give it to torch.optim.SparseAdam"
                )
            gradients[gradient.device].append(gradient if type(gradient) is Tensor else local(gradient))
            owners[gradient.device].append(layer)
    finite = True
    for device, tensors in gradients.items():
        # Float16 ends at 65,504, the norm of such gradients does not.
        halves = any(tensor.dtype == torch.float16 for tensor in tensors)
        of_device = torch._foreach_norm(tensors, dtype=torch.float32 if halves else None)
        norm = torch.stack([norm.float() for norm in of_device])
        answers = torch.stack((torch.isfinite(norm.square()).all(), norm.all()))  # asked of a GPU at once
        is_finite, has_no_zero = answers.tolist()
        finite = finite and is_finite
        if zero is not None and not has_no_zero:
            zero.update(_zero_layers(owners[device], norm.tolist()))
    return finite and all(record.is_finite() for record in samples)


def _zero_layers(owners: Sequence[Layer], norms: Sequence[float]) -> set[Layer]:
    """The layers all of whose gradients have norm zero."""
    return set(owners).difference(owner for owner, norm in zip(owners, norms, strict=True) if norm)


def unscale(optimizer: Optimizer) -> bool:
    """Undo what the GradScaler of this step did to every `.grad`; False if it found one that is not finite.

    After `scaler.unscale_(optimizer)` nothing is left to undo.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    if found is not None and bool(found):
        return False
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if gradients:
            torch._foreach_mul_(gradients, 1 / scale.item())
    return True


def loss_scale(optimizer: Any, needed: bool) -> float:
    """What the loss was multiplied by before its backward pass; `needed`: whether it has to be known."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        return scale.item()
    if optimizer.loss_scale is not None:
        return float(optimizer.loss_scale())
    of_driver = scale_of_driver(optimizer)
    if of_driver is not None:
        return of_driver
    if needed and hasattr(optimizer, "found_inf"):
        raise ValueError(
            'fisher="empirical" reads output gradients, which carry the scale of the loss, and no '
            "torch.amp.GradScaler drives this step: set optimizer.loss_scale to a function that returns it"
        )
    return 1.0


def full_precision(groups: Iterable[Mapping[str, Any]]) -> ExitStack:
    """Switch autocast off on the devices of the parameters, and answer for parameters without values.

    Autocast would round matrices to half precision, and their inverses would be those of other matrices.
    """
    stack = ExitStack()
    parameters = [parameter for group in groups for parameter in group["params"]]
    for kind in {parameter.device.type for parameter in parameters}:
        if kind != "meta" and torch.is_autocast_enabled(kind):  # which knows no autocast
            stack.enter_context(torch.autocast(kind, enabled=False))
    # Under torch.compile tensors have values when the compiled step runs.
    if not torch.compiler.is_compiling() and any(map(has_no_values, parameters)):
        stack.enter_context(UsualAnswers())
    return stack
