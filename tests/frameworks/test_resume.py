"""A run with labels from the model that a checkpoint interrupts goes on bit for bit, in every trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import minifisher
from tests.frameworks.conftest import Classifier, needs

METHODS = {"mbf": {"statistics_every": 2}, "kfac": {"statistics_every": 3}, "tnt": {}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))


def optimizer_of(model: nn.Module, method: str) -> minifisher.CurvatureOptimizer:
    """Made with another seed of its labels every time: a resumed run must take that of the checkpoint."""
    with torch.random.fork_rng():
        torch.seed()
        return minifisher.METHODS[method](model, lr=1e-2, fisher="sampled", **METHODS[method])


def rows() -> TensorDataset:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def assert_same(trained: nn.Module, resumed: nn.Module) -> None:
    start = {name: value.clone() for name, value in network().state_dict().items()}
    for name, value in trained.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert not torch.equal(value, start[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_lightning(method: str, tmp_path: Path) -> None:
    needs("lightning")
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from minifisher.integrations.lightning import MinifisherCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            torch.manual_seed(self.global_step)  # Lightning's checkpoints do not keep the masks of dropout
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.net, method)

    def fit(resumed_from: Path | None = None) -> nn.Module:
        each_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = lightning.Trainer(
            max_epochs=4, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[MinifisherCallback(log_every=3), each_epoch],
        )  # fmt: skip
        module = Module()
        trainer.fit(module, DataLoader(rows(), batch_size=16), ckpt_path=resumed_from)
        return module.net

    whole = fit()
    assert_same(whole, fit(tmp_path / "epoch=1.ckpt"))


@pytest.mark.parametrize("method", METHODS)
def test_transformers(method: str, tmp_path: Path) -> None:
    needs("transformers")
    needs("accelerate")
    import transformers

    from minifisher.integrations.transformers import MinifisherCallback

    def train(folder: str, **how: Any) -> Classifier:
        model = Classifier(network())
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=9, per_device_train_batch_size=16, logging_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=4,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=[{"inputs": row, "labels": label} for row, label in rows()],
            optimizers=(optimizer_of(model, method), None),
            callbacks=[MinifisherCallback()],
        )
        trainer.train(**how)
        return model

    whole = train("whole")
    resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(whole.net, resumed.net)


@pytest.mark.parametrize("method", METHODS)
def test_accelerate(method: str, tmp_path: Path) -> None:
    needs("accelerate")
    import accelerate

    from minifisher.integrations.accelerate import observe

    def prepared() -> tuple[Any, nn.Module, Any]:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True)
        net = network()
        return accelerator, *accelerator.prepare(net, optimizer_of(net, method))

    def train(accelerator: Any, model: nn.Module, optimizer: Any, steps: range) -> None:
        inputs, targets = rows().tensors
        for step in steps:
            batch = slice(16 * (step % 4), 16 * (step % 4) + 16)
            outputs = model(inputs[batch])
            observe(optimizer, outputs)
            accelerator.backward(functional.cross_entropy(outputs, targets[batch]))
            optimizer.step()
            optimizer.zero_grad()

    whole = prepared()
    train(*whole, range(5))
    whole[0].save_state(str(tmp_path))
    train(*whole, range(5, 12))
    resumed = prepared()
    resumed[0].load_state(str(tmp_path))
    train(*resumed, range(5, 12))
    assert_same(whole[1], resumed[1])
