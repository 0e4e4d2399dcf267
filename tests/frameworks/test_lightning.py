from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import minifisher
from tests.frameworks.conftest import needs

needs("lightning")
import lightning  # noqa: E402

from minifisher.integrations.lightning import MinifisherCallback  # noqa: E402
from minifisher.integrations.outputs import observe_outputs  # noqa: E402


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


def rows() -> TensorDataset:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


class SharedBatches(Module):
    """Reads mini-batches of 32 rows in their order, of which every process has its share."""

    def train_dataloader(self) -> DataLoader[Any]:
        processes = self.trainer.world_size
        share = DistributedSampler(rows(), processes, self.trainer.global_rank, shuffle=False)
        return DataLoader(rows(), batch_size=32 // processes, sampler=share)


def trained(module: Module, precision: str | None, clip: float | None = None, **options: Any) -> Module:
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        precision=precision,
        gradient_clip_val=clip,
        **{"devices": 1, **options},
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = None if isinstance(module, SharedBatches) else DataLoader(rows(), batch_size=16)
    trainer.fit(module, loader)
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


@pytest.mark.parametrize(("method", "precision"), [("kfac", "bf16-mixed"), ("mbf", "16-mixed")])
def test_two_processes_in_mixed_precision_step_as_one(method: str, precision: str) -> None:
    """Half a mini-batch each, through DistributedDataParallel over gloo, with samples and clipping."""
    results = []
    for processes in ({"devices": 1}, {"devices": 2, "strategy": "ddp_spawn"}):
        scaled = {"plugins": [half_precision(2.0**8)]} if precision == "16-mixed" else {}
        module = SharedBatches(method, fisher="empirical", damping=0.1)
        options = {**processes, **scaled, "use_distributed_sampler": False}
        trained(module, None if scaled else precision, 1.0, **options)
        results.append([parameter.detach() for parameter in module.net.parameters()])
    start = torch.cat([parameter.detach().flatten() for parameter in Module().net.parameters()])
    one, two = (torch.cat([parameter.flatten() for parameter in result]) for result in results)
    assert (one - start).norm() > 1
    assert (one - two).norm() < 0.05 * (one - start).norm()  # in float32 they differ by 1e-6 of it


def test_the_callback_draws_labels_logs_and_removes_its_hook() -> None:
    module = Module("kfac")
    hooks = len(module.net._forward_hooks)
    trained(module, "bf16-mixed", callbacks=[MinifisherCallback(log_every=1)])
    optimizer = module.trainer.optimizers[0]
    assert optimizer.param_groups[0]["label_draws"] > 0
    assert optimizer.diagnostics()["weights"]["0.weight"]["observations"] > 0
    assert -1 <= module.trainer.callback_metrics["minifisher/cosine_mean"] <= 1
    assert len(module.net._forward_hooks) == hooks


def test_the_callback_asks_which_module_returns_the_prediction() -> None:
    class Whole(Module):
        def configure_optimizers(self) -> Any:
            return minifisher.KFAC(self, lr=1e-2)

    with pytest.raises(ValueError, match="name the submodule that returns the prediction"):
        trained(Whole(), "32-true", callbacks=[MinifisherCallback()])
    trained(Whole(), "32-true", callbacks=[MinifisherCallback(module="net")])


def test_kbfgs_gets_its_closure_or_says_what_works() -> None:
    module = trained(Module("kbfgs"), "32-true")
    assert module.losses[-1] < module.losses[0]
    with pytest.raises(TypeError, match="except with 16-mixed precision"):
        trained(Module("kbfgs"), None, plugins=[half_precision(2.0**8)])
    adaptive = Module(adaptive_damping=True)
    adaptive.training_step = lambda *_: pytest.fail("a batch was read")  # type: ignore[method-assign]
    callback = {"callbacks": [MinifisherCallback()], "plugins": [half_precision(2.0**8)]}
    with pytest.raises(TypeError, match=r"MBF.*except with 16-mixed precision"):
        trained(adaptive, None, **callback)


def test_fabric_in_bfloat16_draws_labels() -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net = nn.Linear(8, 2)
    model, optimizer = fabric.setup(net, minifisher.KFAC(net))
    observe_outputs(net, optimizer)
    outputs = model(torch.randn(16, 8))
    fabric.backward(functional.cross_entropy(outputs.float(), torch.randint(2, (16,))))
    optimizer.step()
    assert optimizer.param_groups[0]["label_draws"] == 1
