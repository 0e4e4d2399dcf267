from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import minifisher
from tests.frameworks.conftest import needs

needs("lightning")
import lightning  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(
        self, method: str = "mbf", manual: bool = False, clips: float | None = None, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        self.method, self.options, self.clips = method, options, clips
        self.automatic_optimization = not manual
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            if self.clips:
                self.clip_gradients(optimizer, self.clips, "norm")
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return minifisher.METHODS[self.method](self.net, lr=3e-2, **self.options)


def batches() -> DataLoader[Any]:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=16)


def trained(module: Module, precision: str | None, clip: float | None = None, **options: Any) -> Module:
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        precision=precision,
        gradient_clip_val=clip,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, batches())
    return module


def half_precision(scale: float) -> Any:
    """What precision="16-mixed" is on a GPU; on the CPU Lightning would turn it into "bf16-mixed"."""
    scaler = torch.amp.GradScaler("cpu", scale, growth_interval=10**6)
    return lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("method", ["mbf", "kfac"])
@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_clipping_goes_with_bfloat16(method: str, fisher: str) -> None:
    if fisher in minifisher.METHODS[method].estimators:
        module = trained(Module(method, fisher=fisher), "bf16-mixed", clip=1.0)
        assert module.losses[-1] < 0.7 * module.losses[0]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_the_scale_of_the_loss_leaves_no_trace_with_float16(fisher: str, clip: float | None) -> None:
    """Scales are powers of two, so what depends on the scale differs by far more than by rounding."""
    results = []
    for scale in (2.0**4, 2.0**10):
        module = Module(fisher=fisher, relative_damping=False, damping=1e-3)
        trained(module, None, clip, plugins=[half_precision(scale)])
        assert module.losses[-1] < 0.7 * module.losses[0]
        results.append([parameter.detach() for parameter in module.net.parameters()])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_manual_optimisation_with_clipping(precision: str) -> None:
    module = Module(fisher="empirical", manual=True, clips=1.0)
    options = {"plugins": [half_precision(2.0**8)]} if precision == "16-mixed" else {}
    trained(module, None if options else precision, **options)
    assert module.losses[-1] < 0.7 * module.losses[0]


def test_steps_with_an_infinite_gradient_are_left_out() -> None:
    module = Module(fisher="empirical")
    plugin = half_precision(2.0**40)  # every gradient overflows
    before = copy.deepcopy(module.net.state_dict())
    trained(module, None, 0.5, plugins=[plugin])
    assert plugin.scaler.get_scale() == 2.0**28  # half of it after each of twelve steps
    torch.testing.assert_close(module.net.state_dict(), before, rtol=0, atol=0)
