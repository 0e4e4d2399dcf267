"""The options that all methods have."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from minifisher.options import HasOptions, Params, option


class CommonOptions(HasOptions):
    """The options of all methods; a method changes defaults and adds its own."""

    params: Params = option(kw_only=False, meaning="What torch.optim takes, or the nn.Module.")
    lr: float | Tensor = option(
        default=1e-3,
        at_least=0,
        every_step=True,
        kw_only=False,
        meaning="Learning rate, in step lengths of `graft`.",
    )
    model: nn.Module | None = option(
        default=None, meaning="The module that the tensors in `params` belong to: their samples can be read."
    )
    momentum: float = option(
        default=0.9, at_least=0, below=1, every_step=True, meaning="mu of M <- mu M + D."
    )
    nesterov: bool = option(
        default=True,
        every_step=True,
        meaning="The direction is P (mu M + D), Nesterov's momentum; False: P M.",
    )
    curvature_decay: float = option(
        default=0.95, at_least=0, below=1, meaning="beta of the running, bias-corrected averages."
    )
    damping: float = option(
        default=0.1,
        at_least=0,
        every_step=True,
        meaning="lambda, or the fraction of the mean curvature that lambda is.",
    )
    relative_damping: bool = option(
        default=True, meaning="Whether `damping` is relative to the mean curvature of block and layer."
    )
    graft: Literal["adam", "adam-rows", "sgd"] | None = option(
        default="adam-rows",
        meaning="Whose step length a weight, or each of its rows, gets; None: its own length.",
    )
    length: Literal["norm", "descent"] | None = option(
        default=None,
        every_step=True,
        meaning='A step has the "norm" of the step of `graft`, or promises its "descent" of the loss; None: '
        '"descent" with a graft.',
    )
    length_limit: float = option(
        default=4.0,
        at_least=1,
        every_step=True,
        meaning='With "descent": at most so many lengths of the step of `graft`, and fewer after a sudden '
        "growth of the gradient.",
    )
    weight_decay: float = option(
        default=0.0, at_least=0, every_step=True, meaning="Decay of the weights; AdamW's is 0.01."
    )
    decoupled_weight_decay: bool = option(
        default=True, meaning="W <- (1 - lr weight_decay) W, instead of weight_decay W in the gradient."
    )
    adaptive_damping: bool = option(
        default=False,
        meaning="Adapt `damping` in every fifth step; `step` then needs a closure, and the optimizer the "
        "module, or `model`, whose buffers it restores.",
    )
    fisher: Literal["gradient", "empirical", "sampled", "exact"] = option(
        default="gradient",
        meaning="What the curvature is made of: the gradient of the mini-batch; or samples, with the labels "
        "of the data, with labels drawn from the model, or with all labels.",
    )
    statistics_every: int | None = option(
        default=None, at_least=1, meaning="Steps between statistics (T1); None chooses what is cheap."
    )
    inverse_every: int | None = option(
        default=None, at_least=1, meaning="Steps between inverses (T2); None chooses what is cheap."
    )
    jitter: bool = option(
        default=True,
        every_step=True,
        meaning="Draw the due step of every period T1 or T2; False: it is the first.",
    )
    fold_bias: bool = option(
        default=False, fixed=True, meaning="Read the bias of a layer as the weight of one more input."
    )
    curvature_dtype: torch.dtype | None = option(
        default=None,
        choices=(None, torch.float32, torch.float64, torch.bfloat16),
        meaning="In which dtype the curvature is kept; None: as the weight, at least float32.",
    )
    maximize: bool = option(default=False, meaning="Maximise the loss.")
    capturable: bool = option(
        default=False,
        fixed=True,
        per_group=False,
        init=False,
        meaning="Let a CUDA graph record the step; it then has no schedule.",
    )
    shard_curvature: bool = option(
        default=False,
        per_group=False,
        meaning="Spread the curvature over the ranks of DistributedDataParallel.",
    )
    statistics_memory: int = option(
        default=256 * 2**20, at_least=1, per_group=False, meaning="Bytes for samples that are read at once."
    )
