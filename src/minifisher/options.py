"""What a user may pass: every check names the value and the cure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

Params = nn.Module | Iterable[Any]
"""What torch.optim takes (tensors, named tensors, groups), a module, or groups whose "params" is one."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "bias_input": ("one", "mean"),
    "fisher": ("gradient", "empirical", "sampled", "exact"),
    "graft": ("adam", "adam-rows", "sgd", None),
    "conv_blocks": (None, "kernel", "row"),
    "inverse": (None, "cholesky", "newton-schulz"),
    "root": ("eigen", "newton"),
    "share": (None, "row", "layer"),
    "weight_sharing": ("expand", "reduce"),
    "adaptive_damping": (False, True),
    "capturable": (False, True),
    "curvature_dtype": (None, torch.float32, torch.float64, torch.bfloat16),
}
_AT_LEAST_ZERO = ("lr", "damping", "weight_decay")
_BELOW_ONE = ("momentum", "curvature_decay", "mu1")
_COUNTS = (
    "block_size",
    "inverse_every",
    "max_dim",
    "merge_dims",
    "pairs",
    "statistics_every",
    "statistics_memory",
)
_SHARED = ("statistics_memory", "kl_clip", "capturable")


def as_groups(params: Params) -> list[dict[str, Any]]:
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
            "got no parameters: an empty iterable, or a generator that was used up before; "
            "pass list(model.parameters()), or the module itself"
        )
    return entries if isinstance(entries[0], Mapping) else [{"params": entries}]


def check_groups(groups: Sequence[Mapping[str, Any]], layers: Iterable[Any]) -> None:
    """Raise for what was done to a group since the last step that the coming one cannot make sense of."""
    for group in groups:
        if isinstance(group["lr"], Real) and not math.isfinite(group["lr"]):
            raise ValueError(f"lr must be finite, got {group['lr']!r}: look at what sets it, a scheduler?")
    enrolled = set(map(id, chain.from_iterable(layer.parameters for layer in layers)))
    present = set(map(id, chain.from_iterable(group["params"] for group in groups)))
    if enrolled != present:
        raise RuntimeError(
            f"param_groups hold {len(present - enrolled)} parameters that no curvature was planned for, and "
            f"miss {len(enrolled - present)} that it was: pass new ones to add_param_group, and make a new "
            "optimizer after parameters were replaced or pruned"
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for the first option of a parameter group that is out of its range."""
    for name in _AT_LEAST_ZERO:
        _require(name, options, lambda value: _is_number(value) and 0 <= value < math.inf, "finite and >= 0")
    for name in _BELOW_ONE:
        _require(name, options, lambda value: _is_number(value) and 0 <= value < 1, "in [0, 1)")
    for name in _COUNTS:
        _require(
            name,
            options,
            lambda value: value is None or (isinstance(value, Integral) and int(value) >= 1),
            "a whole number >= 1, or None",
        )
    _require(
        "power",
        options,
        lambda value: _is_number(value) and 0 < value < math.inf,
        "> 0: 1 for the inverse, 0.5 for the inverse root",
    )
    _require(
        "kl_clip", options, lambda value: value is None or 0 < value < math.inf, "finite and > 0, or None"
    )
    _require(
        "exponent",
        options,
        lambda value: value is None or 0 < value < math.inf,
        "> 0, or None: 1 / (2K) for the published root of each of K modes",
    )
    for name, choices in _CHOICES.items():
        _require(
            name,
            options,
            lambda value, choices=choices: value in choices,
            f"one of {', '.join(map(repr, choices))}",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def _require(name: str, options: Mapping[str, Any], holds: Any, wanted: str) -> None:
    if name in options and not holds(options[name]):
        raise ValueError(f"{name} must be {wanted}, got {options[name]!r}")


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError where a parameter group wants for itself what all groups share."""
    for name in _SHARED:
        if name in group and group[name] != defaults[name]:
            raise ValueError(
                f"{name} is one for all parameter groups, {defaults[name]!r}, and a group asked for "
                f"{group[name]!r}: pass it to the optimizer"
            )


def check_parameter(name: str, parameter: Tensor) -> None:
    """Raise TypeError for a parameter that no real symmetric curvature fits."""
    if parameter.is_complex():
        raise TypeError(
            f"{name} is complex ({parameter.dtype}): view it as real with torch.view_as_real, "
            "or give it to torch.optim"
        )
    if not parameter.is_floating_point():
        raise TypeError(
            f"{name} has dtype {parameter.dtype}: only floating-point parameters have gradients, leave it out"
        )


def check_gradient(name: str, parameter: Tensor) -> None:
    """Raise TypeError for a sparse gradient."""
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        raise TypeError(
            f"{name} has a sparse gradient ({parameter.grad.layout}): use Embedding(sparse=False), "
            "or give it to torch.optim.SparseAdam"
        )
