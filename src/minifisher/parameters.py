"""Parameters as a user passes them: groups are made of them, and what cannot be trained is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable


def as_groups(params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    """The parameter groups that `params` stands for."""
    if isinstance(params, nn.Module):
        if next(params.parameters(), None) is None:
            raise ValueError(f"got no parameters: {type(params).__name__} has none, pass the module that has")
        return [{"params": params}]
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be an iterable of tensors, groups or an nn.Module, got one tensor: put it in a list"
        )
    entries = list(params)
    if not entries:
        raise ValueError(
            "got no parameters: the iterable is empty, or a generator that was used up before; "
            "pass list(model.parameters()), or the module itself"
        )
    if any(isinstance(entry, nn.Module) for entry in entries):
        raise TypeError(
            "params is a list of modules: pass the module that holds them, or groups, "
            '[{"params": module}, {"params": another}]'
        )
    return entries if isinstance(entries[0], Mapping) else [{"params": entries}]


def check_model(model: Any, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise TypeError for a `model` that is no module, and ValueError for one of other parameters."""
    if model is None:
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be the nn.Module that the tensors in params belong to, got {model!r}")
    own = set(model.parameters())
    if not any(parameter in own for group in groups for parameter in group["params"]):
        raise ValueError(
            f"model, a {type(model).__name__}, holds none of the parameters: "
            "pass the module that they belong to"
        )


def check_parameter(name: str, parameter: Tensor) -> None:
    """Raise TypeError for a parameter that is no tensor of real floating-point numbers."""
    if parameter.is_complex():
        raise TypeError(
            f"{name} is complex ({parameter.dtype}): view it as real with torch.view_as_real, "
            "or give it to torch.optim"
        )
    if not parameter.is_floating_point():
        raise TypeError(
            f"{name} has dtype {parameter.dtype}: only floating-point parameters have gradients, leave it out"
        )
