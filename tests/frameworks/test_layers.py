"""Layers of other packages are read as `nn.Linear` is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import minifisher
from minifisher.statistics.layers import layers_of
from tests.frameworks.conftest import needs


def steps(layer: nn.Module, fisher: str) -> nn.Module:
    optimizer = minifisher.MBF(layer, lr=1e-2, fisher=fisher)
    data = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        inputs = torch.randn(8, 4, generator=data, dtype=torch.float64)
        layer(inputs).square().sum(1).mean().backward()
        optimizer.step()
    return layer


def of_transformers() -> tuple[nn.Module, bool]:
    needs("transformers")
    from transformers.pytorch_utils import Conv1D

    return Conv1D(3, 4), True


def of_torch_geometric() -> tuple[nn.Module, bool]:
    needs("torch_geometric")
    from torch_geometric.nn import Linear

    return Linear(4, 3), False


def of_timm() -> tuple[nn.Module, bool]:
    needs("timm")
    from timm.layers.linear import Linear

    return Linear(4, 3), False


@pytest.mark.parametrize("fisher", ["gradient", "empirical"])
@pytest.mark.parametrize("make", [of_transformers, of_torch_geometric, of_timm])
def test_a_linear_layer_trains_as_torchs(make: Callable[[], tuple[Any, bool]], fisher: str) -> None:
    made, transposed = make()
    layer, plain = made.double(), nn.Linear(4, 3).double()
    with torch.no_grad():
        plain.weight.copy_(layer.weight.mT if transposed else layer.weight)
        plain.bias.copy_(layer.bias)
    assert layers_of(layer)[0].reads_samples
    trained, expected = steps(layer, fisher), steps(plain, fisher)
    weight = trained.weight.mT if transposed else trained.weight
    torch.testing.assert_close((weight, trained.bias), (expected.weight, expected.bias))


def gpt2(**options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, **options)
    return GPT2LMHeadModel(config)


def test_every_matrix_of_gpt2_but_the_tied_embedding_is_read() -> None:
    needs("transformers")
    layers = {layer.name: layer for layer in layers_of(gpt2())}
    matrices = {name for name, layer in layers.items() if "h.0" in name and layer.weight.ndim == 2}
    assert len(matrices) == 4
    assert all(layers[name].reads_samples and layers[name].transposed for name in matrices)


def test_lora_adapters_are_read() -> None:
    needs("peft")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["c_attn", "c_fc"], r=2, fan_in_fan_out=True)
    model = get_peft_model(gpt2(), config)
    optimizer = minifisher.MBF(model, lr=1e-2, fisher="empirical")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(20, (4, 6))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    counts = optimizer.diagnostics()["weights"]
    assert all(counts[name]["observations"] for name in moved)
