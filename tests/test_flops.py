"""The operations of every method, counted by torch, against the formulas of benchmarks/scaling.py.

torch.utils.flop_counter sees matrix products and nothing else: neither decompositions (Cholesky, eigenvalues,
QR), which the formulas count apart, nor what is done entry by entry.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import wraps

import pytest
import torch
from benchmarks.scaling import cost
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import minifisher
from minifisher.methods import mbf_two_sided
from minifisher.statistics.layers import layers_of

SAMPLES, SIDE, CLASSES = 7, 4, 4
VERBS = ("observe", "refresh", "precondition")
CASES = {method: (method, {}) for method in minifisher.METHODS} | {
    "mbf own rows": ("mbf", {"share": "row", "block_size": 5, "inverse": "cholesky"}),
    "mbf kernels": ("mbf", {"conv_blocks": "kernel"}),
    "mbf empirical": ("mbf", {"fisher": "empirical"}),
    "mbf two-sided": ("mbf", {"output_power": 1.0}),
    "mbf two-sided, root": ("mbf", {"output_power": 0.5, "block_size": 4}),
    "mbf two-sided, empirical": ("mbf", {"output_power": 0.5, "fisher": "empirical"}),
    "shampoo, cut": ("shampoo", {"max_dim": 4}),
    "kfac exact": ("kfac", {"fisher": "exact"}),
}


def of_baddbmm_in_place(_, left, right, **options):
    """What torch's table has of the other baddbmm alone: tensors [n, rows, k] and [n, k, columns]."""
    return 2 * left.numel() * right.shape[-1]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 5, 3)
        self.hidden = nn.Linear(5, 12, bias=False)
        self.last = nn.Linear(12, CLASSES)

    def forward(self, images):
        hidden = self.convolution(images).flatten(2).mean(2)
        return self.last(torch.tanh(self.hidden(hidden)))


of_baddbmm_in_place._get_raw = True  # called with tensors, not with their shapes
IN_PLACE = {torch.ops.aten.baddbmm_: of_baddbmm_in_place}


@contextmanager
def counting(curvatures):
    """Verb -> operations of matrix products, while it goes on."""
    counts = Counter()

    def counted(kind, verb):
        original = getattr(kind, verb)

        @wraps(original)
        def call(*arguments):
            with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
                result = original(*arguments)
            counts[verb] += counter.get_total_flops()
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(curvature) for curvature in curvatures}:
            for verb in VERBS:
                patch.setattr(kind, verb, counted(kind, verb))
        yield counts


@pytest.mark.parametrize("name", CASES)
def test_the_formulas_count_what_torch_counts(name, monkeypatch):
    monkeypatch.setattr(mbf_two_sided, "suits_numba", lambda *tensors: False)  # whose products nobody counts
    method, options = CASES[name]
    torch.manual_seed(0)
    network = Network()
    optimizer = minifisher.METHODS[method](network, jitter=False, **options)
    group = optimizer.param_groups[0]
    layers = layers_of(network, optimizer.folds if group["fold_bias"] else ())
    plans = {layer: optimizer.plan(layer, group) for layer in layers}

    def closure():
        optimizer.zero_grad()
        outputs = network(torch.randn(SAMPLES, 2, SIDE, SIDE))
        optimizer.observe(outputs)
        loss = nn.functional.cross_entropy(outputs, torch.randint(CLASSES, (SAMPLES,)))
        loss.backward()
        return loss.detach()

    every = max(plan.statistics_every for plan in plans.values())
    assert all(every % plan.statistics_every == 0 for plan in plans.values())
    for _ in range(every):  # the first observation makes what later ones find
        optimizer.step(closure)
    with counting(plan.curvature for plan in plans.values()) as counts:
        optimizer.step(closure)
    positions = {network.convolution.weight: (SIDE - 2) ** 2}
    seen = SAMPLES * (CLASSES if options.get("fisher") == "exact" else 1)  # a backward pass for every class
    costs = [cost(layer, plan, seen, seen * positions.get(layer.weight, 1)) for layer, plan in plans.items()]
    assert counts["precondition"] == sum(c.direction for c in costs) > 0
    assert counts["observe"] == sum(c.statistics for c in costs)
    assert counts["refresh"] == pytest.approx(sum(c.refresh for c in costs))
