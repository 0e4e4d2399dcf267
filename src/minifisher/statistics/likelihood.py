"""Labels drawn from the model's own prediction, for the true Fisher matrix instead of the empirical one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator


def sampled_loss(outputs: Tensor, likelihood: str, generator: Generator | None = None) -> Tensor:
    """Sum over samples of -log p(y | outputs), one label y drawn from p(. | outputs) a data point.

    "categorical": logits [..., classes]; "bernoulli": independent entries, a logit each; "gaussian": entries
    y ~ Normal(z, 1), half squared error. (Martens and Grosse, 2015, Section 5.)
    """
    wide = _checked(outputs, likelihood)
    return _LOSSES[likelihood](wide, generator)


def fisher_losses(outputs: Tensor, likelihood: str) -> tuple[Tensor, ...]:
    """One loss for each entry of a sample's output: together they stand for every label, with no chance left.

    With the likelihood's Fisher matrix F_n = sum_e r_e r_e^T of a sample's E outputs z_n, the e-th loss is
    sqrt(E) sum_n r_e^T z_n: averaged over samples *and* losses, outer products of gradients are the exact
    Fisher matrix. Likelihoods as in `sampled_loss`, samples in the first dimension.
    """
    wide = _checked(outputs, likelihood)
    if likelihood == "categorical" and wide.dim() == 1:
        wide = wide.unsqueeze(0)
    roots = _ROOTS[likelihood](wide).flatten(1) if wide.dim() > 1 else _ROOTS[likelihood](wide).unsqueeze(1)
    return tuple((roots.sum(0) * roots.shape[1] ** 0.5).unbind())


def _checked(outputs: Tensor, likelihood: str) -> Tensor:
    if likelihood not in _LOSSES:
        raise ValueError(f"likelihood must be one of {', '.join(map(repr, _LOSSES))}, got {likelihood!r}")
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        got = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"outputs must be the model's floating-point prediction, one tensor, got {got}")
    # Half precision would lose small probabilities, and the sum.
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _categorical(logits: Tensor, generator: Generator | None) -> Tensor:
    rows = logits.flatten(0, -2) if logits.dim() > 1 else logits.unsqueeze(0)
    # The class with the largest logit + Gumbel noise. torch.multinomial and torch.bernoulli would raise on a
    # prediction that is not a number; here the loss is none either, and whoever averages it can skip it.
    noise = -torch.empty_like(rows).exponential_(generator=generator).log()
    return functional.cross_entropy(rows, (rows.detach() + noise).argmax(-1), reduction="sum")


def _bernoulli(logits: Tensor, generator: Generator | None) -> Tensor:
    uniform = torch.empty_like(logits).uniform_(generator=generator)
    labels = (uniform < logits.detach().sigmoid()).to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")


def _gaussian(means: Tensor, generator: Generator | None) -> Tensor:
    noise = torch.empty_like(means).normal_(generator=generator)
    return 0.5 * functional.mse_loss(means, means.detach() + noise, reduction="sum")


_LOSSES: dict[str, Callable[[Tensor, Generator | None], Tensor]] = {
    "categorical": _categorical,
    "bernoulli": _bernoulli,
    "gaussian": _gaussian,
}


def _categorical_root(logits: Tensor) -> Tensor:
    """F = diag(p) - p p^T = sum_e r_e r_e^T, r_e = sqrt(p_e) (unit vector e - p): r_e^T z."""
    probabilities = logits.detach().softmax(-1)
    return probabilities.sqrt() * (logits - (probabilities * logits).sum(-1, keepdim=True))


def _bernoulli_root(logits: Tensor) -> Tensor:
    """F = diag(p (1 - p)): r_e^T z."""
    probabilities = logits.detach().sigmoid()
    return (probabilities * (1 - probabilities)).sqrt() * logits


_ROOTS: dict[str, Callable[[Tensor], Tensor]] = {
    "categorical": _categorical_root,
    "bernoulli": _bernoulli_root,
    "gaussian": lambda means: means,
}

LABELLED: dict[str, Callable[[Tensor, str], tuple[Tensor, ...]]] = {
    "sampled": lambda outputs, likelihood: (sampled_loss(outputs, likelihood),),
    "exact": fisher_losses,
}
"""The estimators that take their labels from the model: the losses whose gradients they read."""
