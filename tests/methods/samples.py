"""Inputs and output gradients of layers, one sample at a time, apart from the library's own capture."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers import Problem


def calls(case: Problem) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """The inputs and per-sample output gradients of every leaf, by one backward pass for each sample."""
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    leaves = [leaf for leaf in case.module.modules() if not list(leaf.children())]
    for n in range(len(case.inputs)):
        found: list[tuple[nn.Module, Tensor, Tensor]] = []

        def keep(leaf: nn.Module, args: tuple[Tensor], output: Tensor, found: list = found) -> None:
            found.append((leaf, args[0], output))

        handles = [leaf.register_forward_hook(keep) for leaf in leaves]
        loss = case.loss(case.module(case.inputs[n : n + 1].clone()), case.targets[n : n + 1])
        gradients = torch.autograd.grad(loss, [output for _, _, output in found])
        for handle in handles:
            handle.remove()
        for (leaf, inputs, _), gradient in zip(found, gradients, strict=True):
            seen.setdefault(leaf, []).append((inputs.detach(), gradient))
    return {leaf: tuple(map(torch.cat, zip(*pairs, strict=True))) for leaf, pairs in seen.items()}


def patches(leaf: nn.Module, inputs: Tensor, fold_bias: bool = True) -> Tensor:
    """Patches [n, groups, s, in + 1]; a convolution with a unit kernel reads one entry of each patch."""
    if isinstance(leaf, nn.Linear):
        rows = inputs.flatten(1, -2).unsqueeze(1) if inputs.dim() > 2 else inputs[:, None, None]
    else:
        convolve = getattr(functional, f"conv{len(leaf.kernel_size)}d")
        count = leaf.in_channels * math.prod(leaf.kernel_size)
        units = torch.eye(count, dtype=inputs.dtype).reshape(count, leaf.in_channels, *leaf.kernel_size)
        columns = convolve(inputs, units, None, leaf.stride, leaf.padding, leaf.dilation)
        rows = columns.flatten(2).unflatten(1, (leaf.groups, -1)).mT
    folds = fold_bias and leaf.bias is not None
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1) if folds else rows


def places(leaf: nn.Module, gradients: Tensor) -> Tensor:
    """[n, groups, s, out]."""
    if isinstance(leaf, nn.Linear):
        return gradients.flatten(1, -2).unsqueeze(1) if gradients.dim() > 2 else gradients[:, None, None]
    return gradients.flatten(2).unflatten(1, (leaf.groups, -1)).mT
