"""The layers of a network: one weight each, perhaps with its bias.

Samples can be recorded of a `torch.nn.Linear` or `torch.nn.Conv{1,2,3}d` whose forward method is torch's own,
of a few linear layers of other packages, and of the classes that `register_layer` was told of.
Every other parameter is a layer too, of which only the gradient is read; its `note` says why.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    Use = tuple[nn.Module, str]  # a module, and the name of the parameter in it


class _Kind(NamedTuple):
    """How a module reads as a layer."""

    name: str
    transposed: bool = False


_KINDS: dict[type[nn.Module], _Kind] = {
    nn.Linear: _Kind("linear"),
    nn.Conv1d: _Kind("convolution"),
    nn.Conv2d: _Kind("convolution"),
    nn.Conv3d: _Kind("convolution"),
}
# Classes of other packages are recognised by their names, so that the packages need not be imported.
_KNOWN_NAMES: dict[str, _Kind] = {
    "timm.layers.linear.Linear": _Kind("linear"),
    "torch_geometric.nn.dense.linear.Linear": _Kind("linear"),
    "transformers.pytorch_utils.Conv1D": _Kind("linear", transposed=True),
}

EVERY_KIND = tuple(sorted({kind.name for kind in _KINDS.values()}))
"""The kinds of layer whose samples can be recorded."""

_FORWARD_METHODS = ("forward", "_conv_forward")
_ONLY_GRADIENT = ": only its gradient is read"


def register_layer(module_class: type[nn.Module], *, transposed: bool = False) -> type[nn.Module]:
    """Declare that modules of a class are linear layers, h = W a + bias, so that their samples can be read.

    The module keeps W [out, in] in its attribute `weight`, or W^T [in, out] with `transposed=True`, and the
    bias [out], if there is one, in `bias`. It is called with the inputs [n, ..., in] as the first argument,
    and returns the outputs [n, ..., out]. A subclass with a forward method of its own is declared on its own.
    Call it before the optimizer is made. It returns the class, so it can be used as a decorator.

    Raises TypeError if `module_class` is not a class of modules.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"register_layer takes a class of modules, such as MyLinear, got {module_class!r}")
    _KINDS[module_class] = _Kind("linear", transposed)
    return module_class


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
    transposed: bool = False
    """Whether the weight is stored as [in, out]; the joined tensor is [out, in]."""
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
        shape = self._reading(self.weight).shape
        return shape if self.bias is None else torch.Size((shape[0], shape[1:].numel() + 1))

    @property
    def reads_samples(self) -> bool:
        """Whether its samples can be recorded."""
        return bool(self.modules)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor for each parameter -> one tensor [*shape]; without a bias a view, no copy."""
        weight = self._reading(tensors[0])
        if self.bias is None:
            return weight
        return torch.cat((weight.flatten(1), tensors[1].unsqueeze(1)), dim=1)

    def split(self, joined: Tensor) -> tuple[Tensor, ...]:  # [*shape]
        """The inverse of `join`, as views."""
        if self.bias is None:
            return (self._reading(joined),)
        weight = joined[:, :-1].reshape(self._reading(self.weight).shape)
        return self._reading(weight), joined[:, -1]

    def _reading(self, weight: Tensor) -> Tensor:
        """Weight as stored -> [out, in, ...], and back."""
        return weight.mT if self.transposed else weight


def layer_of(name: str, parameter: Tensor) -> Layer:
    """The layer of a parameter that was given without its module."""
    return Layer(name, parameter, note="given as a bare tensor" + _ONLY_GRADIENT)


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter, every one once, without the frozen integers of quantised layers."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or parameter.is_floating_point() or parameter.is_complex()
    }


def layers_of(module: nn.Module, folds: Collection[str] = ()) -> list[Layer]:
    """The layers of a module: every one of `parameters_of` once, in that order.

    For the kinds of layer in `folds`, the bias is folded into the weight if neither of them is tied.
    """
    return _layers_among(parameters_of(module), module, folds)


def layers_of_tensors(
    named: Iterable[tuple[str, Tensor]], module: nn.Module | None, folds: Collection[str] = ()
) -> list[Layer]:
    """The layers of some parameters of a module, with its names; a bias is folded in if it is among them.

    A tensor that is no parameter of the module is a layer of which only the gradient is read.
    """
    names = {tensor: name for name, tensor in named}
    if module is None:
        return [layer_of(name, tensor) for tensor, name in names.items()]
    own = {name: tensor for name, tensor in parameters_of(module).items() if tensor in names}
    foreign = names.keys() - set(own.values())
    bare = [layer_of(name, tensor) for tensor, name in names.items() if tensor in foreign]
    return [*_layers_among(own, module, folds), *bare]


def _layers_among(named: Mapping[str, Tensor], module: nn.Module, folds: Collection[str]) -> list[Layer]:
    uses = _uses(module)
    among = set(named.values())
    pairs = _foldable_biases(module, uses, folds).items()
    biases = {weight: bias for weight, bias in pairs if weight in among and bias in among}
    folded = set(biases.values())
    return [
        _layer(name, parameter, biases.get(parameter), uses[parameter])
        for name, parameter in named.items()
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
        if _KINDS[_base(owner)].name not in folds:
            continue
        if len(uses[weight]) == len(uses[bias]) == 1 and weight.requires_grad == bias.requires_grad:
            biases[weight] = bias
    return biases


def _layer(name: str, weight: Tensor, bias: Tensor | None, uses: list[Use]) -> Layer:
    reasons = [reason for reason in (_reason_against(weight, use) for use in uses) if reason]
    if reasons:
        tied = f"used in {len(uses)} places, among them " if len(uses) > 1 else ""
        return Layer(name, weight, note=tied + ", ".join(reasons) + _ONLY_GRADIENT)
    modules = tuple(dict.fromkeys(owner for owner, _ in uses))
    readings = {(_KINDS[_base(owner)], getattr(owner, "groups", 1)) for owner in modules}
    if len(readings) > 1:
        return Layer(name, weight, note="tied between layers of different kinds or groups" + _ONLY_GRADIENT)
    (((kind, transposed), groups),) = readings
    return Layer(name, weight, bias, modules, kind, groups, transposed)


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
    base = _base_or_none(owner)
    if base is None or name not in ("weight", "bias"):
        return module if name in ("weight", "bias") else f"{name} of {module}"
    if name == "bias":
        return f"bias of {module}"
    if _KINDS[base].transposed and type(parameter) not in (Tensor, nn.Parameter):
        return f"{module}, whose weight is [in, out] and cut over processes, so that its rows are inputs"
    return "" if _has_forward_of(owner, base) else f"{module} with its own forward method"


def _base(module: nn.Module) -> type[nn.Module]:
    base = _base_or_none(module)
    assert base is not None
    return base


def _base_or_none(module: nn.Module) -> type[nn.Module] | None:
    """The nearest class of the module that is known to be a layer; its forward method says how it reads."""
    for base in type(module).__mro__:
        known = _KNOWN_NAMES.get(f"{base.__module__}.{base.__qualname__}")
        if known is not None:
            _KINDS.setdefault(base, known)
        if base in _KINDS:
            return base
    return None


def _has_forward_of(module: nn.Module, base: type[nn.Module]) -> bool:
    # A subclass may override a method, and an instance may have its own.
    return all(
        name not in vars(module) and getattr(type(module), name, None) is getattr(base, name, None)
        for name in _FORWARD_METHODS
    )
