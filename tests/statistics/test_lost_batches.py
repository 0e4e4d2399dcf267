"""A batch whose backward pass raised an error leaves nothing in the statistics that labels are drawn for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minifisher import KFAC
from minifisher.statistics.capture import Capture
from minifisher.statistics.layers import layers_of

BATCHES = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).double() for n in (4, 5, 6)]


class Run:
    """A network whose first layer fails in the backward pass on demand."""

    def __init__(self, backend: str | None) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.capture = Capture(layers_of(self.module), 1 << 30, model_labels=True)
        self.capture.arm()
        self.model = torch.compile(self.module, backend=backend) if backend else self.module

    def observed(self, batch: int) -> torch.Tensor:
        """The training loss of a batch, after labels were drawn for it."""
        outputs = self.model(BATCHES[batch])
        self.capture.differentiate(outputs.sum())
        return outputs.square().mean()

    def train(self, batch: int) -> None:
        self.observed(batch).backward()

    def fail(self, batch: int) -> None:
        """The backward pass raises when the last layer is through."""
        handle = self.module[2].weight.register_hook(fails)
        with pytest.raises(MemoryError):
            self.observed(batch).backward()
        handle.remove()

    def clear(self) -> None:
        self.module.zero_grad()


def fails(gradient: torch.Tensor) -> None:
    raise MemoryError


def never_differentiated(run: Run) -> None:
    run.observed(0)
    run.clear()
    run.train(1)


def failed_on_the_way(run: Run) -> None:
    run.fail(0)
    run.clear()
    run.train(1)


def failed_and_cleared_by_the_optimizer(run: Run) -> None:
    run.fail(0)
    run.clear()
    run.capture.forget_backward()
    run.train(1)


def cleared_after_the_labels_were_drawn(run: Run) -> None:
    run.observed(0)
    run.clear()
    loss = run.observed(1)
    run.clear()
    run.capture.forget_backward()
    loss.backward()


def between_micro_batches(run: Run) -> None:
    run.train(1)
    run.observed(0)
    run.train(2)


def one_loss_of_two_batches(run: Run) -> None:
    (run.observed(1) + run.observed(2)).backward()


def in_passes_of_their_own(run: Run) -> None:
    for batch in (1, 2):
        run.observed(batch)
        run.model(BATCHES[batch]).square().mean().backward()


ONE, TWO = (1,), (1, 2)
SCRIPTS = [
    (never_differentiated, ONE),
    (failed_on_the_way, ONE),
    (failed_and_cleared_by_the_optimizer, ONE),
    (cleared_after_the_labels_were_drawn, ONE),
    (between_micro_batches, TWO),
    (one_loss_of_two_batches, TWO),
    (in_passes_of_their_own, TWO),
]


@pytest.mark.parametrize(("script", "batches"), SCRIPTS, ids=[script.__name__ for script, _ in SCRIPTS])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_samples_are_those_of_batches_that_were_trained_on(script, batches, backend):
    run, reference = Run(backend), Run(None)
    script(run)
    for batch in batches:
        reference.train(batch)
    found, expected = run.capture.collect(), reference.capture.collect()
    for samples, others in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(*(torch.cat(list(one.gradients())) for one in (samples, others)))


def test_the_checkpoint_of_a_whole_network_that_hides_its_layers_is_named_with_its_cure():
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = KFAC(module)
    inputs = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"use_reentrant=True hides them .* Set use_reentrant=False"):
        optimizer.observe(checkpoint(module, inputs, use_reentrant=True))
    outputs = checkpoint(module, inputs, use_reentrant=False)
    optimizer.observe(outputs)
    outputs.sum().backward()
    optimizer.step()
    assert optimizer.diagnostics()["weights"]["0.weight"]["observations"] == 1
