"""The real packages: `make test-frameworks` installs them; a test whose package is missing is skipped."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional


def needs(package: str) -> None:
    """Skip the file that calls it, with the reason, unless the package can be imported."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a package may be installed and not fit this torch
        pytest.skip(
            f"{package} cannot be imported ({type(error).__name__}: {error}); make test-frameworks installs "
            "all but timm and fastai, which need a torchvision for this torch",
            allow_module_level=True,
        )


class Classifier(nn.Module):
    """What the Trainer of transformers expects: a dictionary with the loss and the logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(inputs)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}
