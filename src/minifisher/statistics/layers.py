"""The layers of a network: one weight each, perhaps with its bias.

Samples can be recorded of a `torch.nn.Linear` or `torch.nn.Conv{1,2,3}d` whose forward method is torch's own.
Every other parameter is a layer too, of which only the gradient is read; its `note` says why.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    Use = tuple[nn.Module, str]  # a module, and the name of the parameter in it

_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "convolution",
    nn.Conv2d: "convolution",
    nn.Conv3d: "convolution",
}
EVERY_KIND = tuple(sorted(set(_KINDS.values())))
"""The kinds of layer whose samples can be recorded."""

_FORWARD_METHODS = ("forward", "_conv_forward")


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight, the bias folded into it if any, and the modules that use it."""

    name: str
    weight: Tensor
    bias: Tensor | None = None
    """Set only if it is folded in: as the weight of one more input, which is always 1."""
    modules: tuple[nn.Module, ...] = ()
    """Every module that uses the weight; empty if only the gradient can be read."""
    kind: str = "other"
    """One of "linear", "convolution" and "other"."""
    groups: int = 1
    """The number of groups of a convolution."""
    note: str = ""
    """Why only the gradient can be read; empty if samples can be recorded."""
    piece_units: Mapping[int, int] = field(default_factory=dict)
    """Dimensions along which processes hold pieces of the weight, which start at multiples of a number."""

    parameters: tuple[Tensor, ...] = field(init=False)
    """The weight, and the bias if it is folded in."""

    def __post_init__(self) -> None:
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        object.__setattr__(self, "parameters", parameters)

    @property
    def shape(self) -> torch.Size:
        """Shape of the joined tensor: of the weight, or with a bias [out, weight[0].numel() + 1]."""
        if self.bias is None:
            return self.weight.shape
        return torch.Size((self.weight.shape[0], self.weight.shape[1:].numel() + 1))

    @property
    def reads_samples(self) -> bool:
        """Whether its samples can be recorded."""
        return bool(self.modules)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor for each parameter -> one tensor [*shape]; without a bias the tensor itself, no copy."""
        if self.bias is None:
            return tensors[0]
        weight, bias = tensors
        return torch.cat((weight.flatten(1), bias.unsqueeze(1)), dim=1)

    def split(self, joined: Tensor) -> tuple[Tensor, ...]:  # [*shape]
        """The inverse of `join`."""
        if self.bias is None:
            return (joined,)
        return joined[:, :-1].reshape(self.weight.shape), joined[:, -1]


def layer_of(name: str, parameter: Tensor) -> Layer:
    """The layer of a parameter that was given without its module."""
    return Layer(name, parameter, note="given as a bare tensor: only its gradient is read")


def layers_of(module: nn.Module, folds: Collection[str] = ()) -> list[Layer]:
    """The layers of a module: every parameter once, in the order of `named_parameters`.

    For the kinds of layer in `folds`, the bias is folded into the weight if neither of them is tied.
    """
    uses = _uses(module)
    biases = _foldable_biases(module, uses, folds)
    folded = set(biases.values())
    return [
        _layer(name, parameter, biases.get(parameter), uses[parameter])
        for name, parameter in module.named_parameters()
        if parameter not in folded
    ]


def _uses(module: nn.Module) -> dict[Tensor, list[Use]]:
    uses: dict[Tensor, list[Use]] = defaultdict(list)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            uses[parameter].append((owner, name))
    return uses


def _foldable_biases(
    module: nn.Module, uses: Mapping[Tensor, list[Use]], folds: Collection[str]
) -> dict[Tensor, Tensor]:
    """Weight -> bias. Neither may be tied, because another use of the weight may have no such bias."""
    biases: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        weight, bias = (dict(owner.named_parameters(recurse=False)).get(name) for name in ("weight", "bias"))
        if weight is None or bias is None or _reason_against(weight, (owner, "weight")):
            continue
        if _KINDS[_base(owner)] not in folds:
            continue
        if len(uses[weight]) == len(uses[bias]) == 1 and weight.requires_grad == bias.requires_grad:
            biases[weight] = bias
    return biases


def _layer(name: str, weight: Tensor, bias: Tensor | None, uses: list[Use]) -> Layer:
    reasons = [reason for reason in (_reason_against(weight, use) for use in uses) if reason]
    if reasons:
        tied = f"used in {len(uses)} places, among them " if len(uses) > 1 else ""
        return Layer(name, weight, note=f"{tied}{', '.join(reasons)}: only its gradient is read")
    modules = tuple(dict.fromkeys(owner for owner, _ in uses))
    kinds = {(_KINDS[_base(owner)], getattr(owner, "groups", 1)) for owner in modules}
    if len(kinds) > 1:
        return Layer(
            name, weight, note="tied between layers of different kinds or groups: only its gradient is read"
        )
    ((kind, groups),) = kinds
    return Layer(name, weight, bias, modules, kind, groups)


def _reason_against(parameter: Tensor, use: Use) -> str:
    """Why samples of this use of the parameter cannot be recorded; empty if they can."""
    owner, name = use
    module = type(owner).__name__
    if is_lazy(parameter):
        return f"{module} before its first forward pass"
    if not parameter.numel():
        return f"{module} without entries"
    if isinstance(owner, ParametrizationList):
        return "parametrised by torch.nn.utils.parametrize"
    if isinstance(owner, NonDynamicallyQuantizableLinear) and name == "weight":
        return "output projection of MultiheadAttention, which does not call this module"
    if not isinstance(owner, tuple(_KINDS)) or name not in ("weight", "bias"):
        return module if name in ("weight", "bias") else f"{name} of {module}"
    if name == "bias":
        return f"bias of {module}"
    return "" if _has_forward_of(owner, _base(owner)) else f"{module} with its own forward method"


def _base(module: nn.Module) -> type[nn.Module]:
    return next(base for base in _KINDS if isinstance(module, base))


def _has_forward_of(module: nn.Module, base: type[nn.Module]) -> bool:
    # A subclass may override a method, and an instance may have its own.
    return all(
        name not in vars(module) and getattr(type(module), name, None) is getattr(base, name, None)
        for name in _FORWARD_METHODS
    )
