"""One step of Shampoo and of SOAP beside pytorch-optimizer's, on the same weights and gradients in float64.

    pip install -r benchmarks/requirements.txt && python benchmarks/compare_with_pytorch_optimizer.py

Shampoo. The first step is the same: with `graft=None`, no momentum, an absolute damping of the peer's
`matrix_eps`, nothing cut (`max_dim`) and nothing merged (`merge_dims=1`), both take (H_i + eps I)^(-1/(2K))
of H_i = mat_i(D) mat_i(D)^T. From the second step on the peer's H_i is the *sum* over the steps, ours the
mean: after t equal steps the peer's is t^(-1/2) times as long. The figure for the fifth step
divides this out, and is exact where eps is small beside H_i / t.

SOAP. The peer's first step makes the basis of its first gradient and moves nothing; the second is compared
here, with the curvature's own verbs and one gradient in V. The null space of a singular factor has no basis
of its own, and Adam's step depends on it, so the peer's basis is put in place of ours; that ours, too,
diagonalises the peer's factors is reported beside it. What remains different in whole runs:
- ours also steps on the first gradient and counts it in V and in the momentum;
- ours reads the statistics of a step before it takes it: a basis refreshed at step t is used at step t and
  not at t + 1; and it is refreshed at every step of the first `inverse_every`;
- dimensions above `max_dim` are cut into blocks; the peer leaves them in their own basis;
- `damping` is by default a fraction of the root mean square; here it is the peer's absolute `eps`;
- the peer decays the weights after the step, ours before, as torch.optim.AdamW.
How much that is shows in the cosine between the two updates, averaged over steps 3 to 40 of one stream.

Prints a line of JSON a comparison, and exits with 1 where one that should be the same is not.
"""

from __future__ import annotations

import json
import sys

import pytorch_optimizer as peer
import torch
from torch import Tensor

import minifisher
from minifisher.statistics.layers import layer_of
from minifisher.statistics.records import BatchGradient

SHAPES = ((6,), (5, 5), (5, 8), (4, 3, 3, 2))
WHOLE = 10**6  # max_dim: nothing is cut
TOLERANCE = 1e-6


def gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """A stream with a common direction, so that averages mean something."""
    generator = torch.Generator().manual_seed(len(shape))
    common = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [common + torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def updates(optimizer: torch.optim.Optimizer, weight: Tensor, stream: list[Tensor]) -> list[Tensor]:
    """What every step adds to the weight."""
    steps = []
    for gradient in stream:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        steps.append(weight.detach() - before)
    return steps


def zeros(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, requires_grad=True)


def shampoo_steps(shape: tuple[int, ...], stream: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    ours, peers = zeros(shape), zeros(shape)
    our_optimizer = minifisher.Shampoo(
        [ours],
        lr=0.1,
        momentum=0.0,
        curvature_decay=1 - 1e-9,  # a plain mean
        damping=1e-6,
        relative_damping=False,
        graft=None,
        max_dim=WHOLE,
        merge_dims=1,
        statistics_every=1,
        inverse_every=1,
    )
    peer_optimizer = peer.Shampoo([peers], lr=0.1, momentum=0.0, matrix_eps=1e-6)
    return updates(our_optimizer, ours, stream), updates(peer_optimizer, peers, stream)


def soap_step(shape: tuple[int, ...], stream: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Ours on the peer's basis with one gradient in V; the peer's second step; how far off our basis is."""
    beta, lr, epsilon = 0.95, 0.1, 1e-8
    peers = zeros(shape)
    options = {"lr": lr, "weight_decay": 0.0, "precondition_1d": True, "eps": epsilon}
    peer_optimizer = peer.SOAP([peers], **options)
    updates(peer_optimizer, peers, stream[:1])
    bases = [basis.clone() for basis in peer_optimizer.state[peers]["Q"]]
    factors = [factor.clone() for factor in peer_optimizer.state[peers]["GG"]]
    second = updates(peer_optimizer, peers, stream[1:])[0]
    optimizer = minifisher.SOAP([peers], max_dim=WHOLE, merge_dims=1, relative_damping=False)
    layer = layer_of("weight", peers)
    curvature = optimizer.plan(layer, optimizer.defaults).curvature
    state = curvature.init(layer)
    curvature.observe(state, BatchGradient(stream[0]), 0.0)
    off = max(off_diagonal(state[f"basis_{mode}"][0], factor) for mode, factor in enumerate(factors))
    for mode, basis in enumerate(bases):
        state[f"basis_{mode}"].copy_(basis)
    state["rotated_square"].zero_()
    curvature.observe(state, BatchGradient(stream[1]), beta)
    correction = (
        1 - beta
    ) ** 0.5  # V holds (1 - beta) of the square, which the engine's running average corrects
    direction = curvature.precondition(state, stream[1], epsilon)
    return -lr * correction * direction, second, off


def off_diagonal(basis: Tensor, factor: Tensor) -> float:
    """The share of Q^T H Q beside its diagonal."""
    rotated = basis.T @ factor @ basis
    return float((rotated - rotated.diagonal().diag()).norm() / rotated.norm())


def soap_cosine(shape: tuple[int, ...], stream: list[Tensor]) -> float:
    ours, peers = zeros(shape), zeros(shape)
    our_optimizer = minifisher.SOAP([ours], max_dim=WHOLE, merge_dims=1, damping=1e-8, relative_damping=False)
    peer_optimizer = peer.SOAP([peers], weight_decay=0.0, precondition_1d=True)
    pairs = zip(updates(our_optimizer, ours, stream), updates(peer_optimizer, peers, stream), strict=True)
    cosines = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in list(pairs)[2:]]
    return float(torch.stack(cosines).mean())


def difference(ours: Tensor, peers: Tensor) -> float:
    return float((ours - peers).norm() / peers.norm())


def main() -> int:
    worst = 0.0
    for shape in SHAPES:
        ours, peers = shampoo_steps(shape, gradients(shape, 5))
        *soap, off = soap_step(shape, gradients(shape, 2))
        same = {
            "shampoo, first step": difference(ours[0], peers[0]),
            "soap, one step": difference(*soap),
            "soap, basis": off,
        }
        worst = max(worst, *same.values())
        apart = {
            "shampoo, fifth step, sum as mean": difference(ours[4], peers[4] * 5**0.5),
            "soap, mean cosine of 38 updates": soap_cosine(shape, gradients(shape, 40)),
        }
        print(json.dumps({"shape": shape, **same, **apart}))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
