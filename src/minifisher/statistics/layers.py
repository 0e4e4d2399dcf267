"""How the parameters of a network read as layers: one weight each, and what of it can be captured.

A layer whose samples can be read is a `torch.nn.Linear` or a `torch.nn.Conv{1,2,3}d` that is *called* as
such. Of every other parameter only the gradient is read, and its `note` says why: nothing is left out and
nothing is guessed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    Use = tuple[nn.Module, str]  # a module, and the name under which it holds the parameter

_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "convolution",
    nn.Conv2d: "convolution",
    nn.Conv3d: "convolution",
}
EVERY_KIND = tuple(sorted(set(_KINDS.values())))
"""The kinds of layer that a capture reads."""

_METHODS_THAT_COMPUTE = ("forward", "_conv_forward")


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight, the bias folded into it if any, and how it reads."""

    name: str
    weight: Tensor
    bias: Tensor | None = None
    """Only where it is folded in, as the weight of one more input that is always 1."""
    modules: tuple[nn.Module, ...] = ()
    """Every module that computes with the weight; empty where only the gradient can be read."""
    kind: str = "other"
    """ "linear", "convolution" or "other"."""
    groups: int = 1
    """Of a grouped convolution."""
    note: str = ""
    """Why only the gradient can be read."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The weight, and the bias where it is folded in."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> torch.Size:
        """Of the joined tensor: the weight's; with a bias [out, in + 1] or [out, in / groups k1 k2 + 1]."""
        if self.bias is None:
            return self.weight.shape
        return torch.Size((self.weight.shape[0], self.weight.shape[1:].numel() + 1))

    @property
    def reads_samples(self) -> bool:
        """Whether a capture can read it sample by sample."""
        return bool(self.modules)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor a parameter -> [*shape]; without a bias it is the tensor itself, not a copy."""
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
    """The layer of a tensor that came without its module."""
    return Layer(name, parameter, note="given as a bare tensor: only its gradient is read")


def layers_of(module: nn.Module, folds: Collection[str] = ()) -> list[Layer]:
    """Every parameter of the module exactly once, in the order of `named_parameters`.

    Layers of a kind in `folds` have their bias folded into the weight, where neither is tied.
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
    """Weight -> bias, where neither is tied: a tied one would be an input of some uses and not of others."""
    biases: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        weight, bias = (dict(owner.named_parameters(recurse=False)).get(name) for name in ("weight", "bias"))
        if weight is None or bias is None or _obstacle(weight, (owner, "weight")):
            continue
        if _KINDS[_base(owner)] not in folds:
            continue
        if len(uses[weight]) == len(uses[bias]) == 1 and weight.requires_grad == bias.requires_grad:
            biases[weight] = bias
    return biases


def _layer(name: str, weight: Tensor, bias: Tensor | None, uses: list[Use]) -> Layer:
    obstacles = [obstacle for obstacle in (_obstacle(weight, use) for use in uses) if obstacle]
    if obstacles:
        tied = f"tied between {len(uses)} places, of which " if len(uses) > 1 else ""
        return Layer(name, weight, note=f"{tied}{', '.join(obstacles)}: only its gradient is read")
    modules = tuple(dict.fromkeys(owner for owner, _ in uses))
    kinds = {(_KINDS[_base(owner)], getattr(owner, "groups", 1)) for owner in modules}
    if len(kinds) > 1:
        return Layer(name, weight, note="tied between unlike layers: only its gradient is read")
    ((kind, groups),) = kinds
    return Layer(name, weight, bias, modules, kind, groups)


def _obstacle(parameter: Tensor, use: Use) -> str:
    """What keeps a capture from reading this use of the parameter; empty where nothing does."""
    owner, name = use
    module = type(owner).__name__
    if is_lazy(parameter):
        return f"{module} before its first forward pass"
    if isinstance(owner, ParametrizationList):
        return "parametrised"
    if isinstance(owner, NonDynamicallyQuantizableLinear) and name == "weight":
        return "output projection of MultiheadAttention, which is never called itself"
    if not isinstance(owner, tuple(_KINDS)) or name not in ("weight", "bias"):
        return module if name in ("weight", "bias") else f"{name} of {module}"
    if name == "bias":
        return f"bias of {module}"
    return "" if _computes_as(owner, _base(owner)) else f"{module} with a forward of its own"


def _base(module: nn.Module) -> type[nn.Module]:
    return next(base for base in _KINDS if isinstance(module, base))


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    # A method may be replaced in a subclass or on the instance itself.
    return all(
        name not in vars(module) and getattr(type(module), name, None) is getattr(base, name, None)
        for name in _METHODS_THAT_COMPUTE
    )
