"""An optimizer by its name or class, in the words of each framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import minifisher
from tests.frameworks.conftest import Classifier, needs


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: Any) -> tuple[float, float]:
    """The loss before and after ten steps."""
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), (inputs[:, 0] > 0).long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_timm() -> None:
    needs("timm")
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    default_registry.register(
        OptimInfo("mbf", minifisher.MBF, "mini-block Fisher", has_eps=False, has_momentum=True)
    )
    model = network()
    options: Any = {"weight_decay": 0.05, "layer_decay": 0.7, "model": model, "fisher": "empirical"}
    optimizer = create_optimizer_v2(model, "mbf", lr=1e-2, **options)
    before, after = train(model, optimizer)
    assert after < before
    assert optimizer.diagnostics()["weights"]["2.weight"]["observations"] > 0
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


def test_timms_lookahead_wraps_it() -> None:
    needs("timm")
    from timm.optim import Lookahead

    model = network()
    before, after = train(model, Lookahead(minifisher.MBF(model, lr=1e-2)))
    assert after < before


def test_lightning_cli() -> None:
    needs("lightning")
    needs("jsonargparse")
    import lightning
    from lightning.pytorch.cli import LightningCLI

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

    words = ["--optimizer", "minifisher.MBF", "--optimizer.lr", "0.01", "--optimizer.graft", "adam"]
    cli = LightningCLI(Module, args=words, run=False, save_config_callback=None)
    optimizer: Any = cli.model.configure_optimizers()
    assert type(optimizer) is minifisher.MBF
    assert (optimizer.lr, optimizer.graft) == (0.01, "adam")
    assert optimizer.damping == minifisher.MBF.options["damping"].default


def test_pytorch_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("pytorch_optimizer")
    from pytorch_optimizer.optimizer import OPTIMIZERS, create_optimizer

    monkeypatch.setitem(OPTIMIZERS, "mbf", minifisher.MBF)
    model = network()
    optimizer = create_optimizer(model, "mbf", lr=1e-2, weight_decay=0.01, damping=0.2)
    before, after = train(model, optimizer)
    assert after < before
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.01}


def test_skorch() -> None:
    needs("skorch")
    import skorch

    net = skorch.NeuralNetClassifier(
        network(), criterion=nn.CrossEntropyLoss, optimizer=minifisher.MBF, lr=1e-2, max_epochs=5,
        optimizer__damping=0.2, verbose=0, train_split=None,
    )  # fmt: skip
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    net.fit(inputs, (inputs[:, 0] > 0).long())
    losses = net.history[:, "train_loss"]
    assert losses[-1] < losses[0]
    assert net.optimizer_.damping == 0.2


@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
def test_the_trainer_of_transformers(fisher: str, tmp_path: Path) -> None:
    needs("transformers")
    needs("accelerate")
    import transformers

    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    rows = [{"inputs": row, "labels": (row[0] > 0).long()} for row in inputs]
    model = Classifier(network())
    options: dict[str, Any] = {"lr": 1e-2, "fisher": fisher}
    if fisher == "empirical":
        options["model"] = model  # the trainer then passes the module instead of groups
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=40,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        logging_steps=10,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=(minifisher.MBF, options)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    inner: Any = trainer.optimizer
    while not isinstance(inner, minifisher.MBF) or hasattr(inner, "optimizer"):
        inner = inner.optimizer
    assert all(counts["observations"] for counts in inner.diagnostics()["weights"].values())
