"""Losses on labels from the model's own prediction: they give the Fisher matrix, not the empirical one.

A likelihood says how outputs z predict labels y. "categorical": logits [..., classes]. "bernoulli": one logit
for each independent binary label. "gaussian": means, y ~ Normal(z, 1), whose loss is half the squared error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from minifisher.without_values import has_no_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator

    NextGenerator = Callable[[torch.device], Generator | None]


def sampled_loss(outputs: Tensor, likelihood: str, generator: Generator | None = None) -> Tensor:
    """Sum over samples of -log p(y | z), with labels y drawn from p(. | z).

    (Martens and Grosse, 2015, Section 5.) Outputs with positions draw one label for each position.
    """
    outputs = _checked(outputs, likelihood)
    return _LOSSES[likelihood](outputs, _LABELS[likelihood](outputs.detach(), generator))


def drawn_labels(outputs: Tensor, likelihood: str, generator: Generator | None = None) -> Tensor:
    """Labels y drawn from p(. | z): class indices, [...], of logits [..., classes]; else as the outputs."""
    outputs = _checked(outputs, likelihood)
    return _LABELS[likelihood](outputs.detach(), generator)


def fisher_losses(outputs: Tensor, likelihood: str) -> tuple[Tensor, ...]:
    """E losses for E outputs z_n of a sample, which replace the average over all labels, without sampling.

    Let F_n = sum_e r_e r_e^T be the likelihood's Fisher matrix [E, E]. The e-th loss is
    sqrt(E) sum_n r_e^T z_n. The mean over samples *and* losses of the gradients' outer products is the exact
    Fisher matrix. The first dimension of the outputs is that of the samples.
    """
    outputs = _checked(outputs, likelihood)
    if likelihood == "categorical" and outputs.dim() == 1:
        outputs = outputs.unsqueeze(0)
    products = _ROOT_PRODUCTS[likelihood](outputs)  # r_e^T z_n
    products = products.flatten(1) if outputs.dim() > 1 else products.unsqueeze(1)  # [n, E]
    return tuple((products.sum(0) * products.shape[1] ** 0.5).unbind())


def _checked(outputs: Tensor, likelihood: str) -> Tensor:
    if likelihood not in _LOSSES:
        raise ValueError(f"likelihood must be one of {', '.join(map(repr, _LOSSES))}, got {likelihood!r}")
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        got = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"outputs must be the model's floating-point prediction, one tensor, got {got}")
    if likelihood == "categorical" and outputs.shape[-1:] == (1,):
        raise ValueError(
            f"outputs {list(outputs.shape)} are logits of one class, which is certain: pass "
            'likelihood="bernoulli" for one logit of a yes or no, "gaussian" for a mean'
        )
    # In half precision small probabilities would be lost, and the sum would be too coarse.
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _draw_class(logits: Tensor, generator: Generator | None) -> Tensor:
    # The class with the largest sum of logit and Gumbel noise. torch.multinomial and torch.bernoulli would
    # raise an error if the prediction is NaN; here the loss is NaN, and the optimizer skips the step.
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits + noise).argmax(-1)


def _draw_bit(logits: Tensor, generator: Generator | None) -> Tensor:
    uniform = torch.empty_like(logits).uniform_(generator=generator)
    return (uniform < logits.sigmoid()).to(logits.dtype)


def _draw_normal(means: Tensor, generator: Generator | None) -> Tensor:
    return means + torch.empty_like(means).normal_(generator=generator)


_LABELS: dict[str, Callable[[Tensor, Generator | None], Tensor]] = {
    "categorical": _draw_class,
    "bernoulli": _draw_bit,
    "gaussian": _draw_normal,
}


def _categorical(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")


def _bernoulli(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")


def _gaussian(means: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * functional.mse_loss(means, labels, reduction="sum")


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": _categorical,
    "bernoulli": _bernoulli,
    "gaussian": _gaussian,
}


def _categorical_products(logits: Tensor) -> Tensor:
    """r_e^T z with F = diag(p) - p p^T = sum_e r_e r_e^T and r_e = sqrt(p_e) (unit vector e - p)."""
    probabilities = logits.detach().softmax(-1)
    return probabilities.sqrt() * (logits - (probabilities * logits).sum(-1, keepdim=True))


def _bernoulli_products(logits: Tensor) -> Tensor:
    """r_e^T z with F = diag(p (1 - p))."""
    probabilities = logits.detach().sigmoid()
    return (probabilities * (1 - probabilities)).sqrt() * logits


_ROOT_PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "categorical": _categorical_products,
    "bernoulli": _bernoulli_products,
    "gaussian": lambda means: means,
}


def _sampled(outputs: Tensor, likelihood: str, generator: NextGenerator) -> tuple[Tensor]:
    # Tensors without values draw nothing, and torch has no generators for them.
    draws = isinstance(outputs, Tensor) and not has_no_values(outputs)
    return (sampled_loss(outputs, likelihood, generator(outputs.device) if draws else None),)


MODEL_LABEL_LOSSES: dict[str, Callable[[Tensor, str, NextGenerator], tuple[Tensor, ...]]] = {
    "sampled": _sampled,
    "exact": lambda outputs, likelihood, _: fisher_losses(outputs, likelihood),
}
"""Estimators whose labels come from the model -> the losses whose gradients they need."""
