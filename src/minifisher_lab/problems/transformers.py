"""Transformers: a character model of Shakespeare (GPT) and small vision transformers (ViT)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from minifisher_lab.problems.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

CHARACTERS = 84
"""The distinct characters in the works of Shakespeare."""


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, positions, width] to the same shape; causal: a position sees itself and earlier ones."""
        parts = self.queries_keys_values(hidden).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)  # each [N, heads, positions, width / heads]
        seen = functional.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        projected: Tensor = self.projection(seen.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), with 4 x width GELUs (pre-norm: Radford et al. 2019)."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, positions, width] to the same shape."""
        hidden = hidden + self.attention(self.norm1(hidden))
        result: Tensor = hidden + self.mlp(self.norm2(hidden))
        return result


class Gpt(nn.Module):
    """A decoder that predicts the next character: embeddings, pre-norm blocks, norm, linear head."""

    def __init__(self, layers: int, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.positions = nn.Embedding(window, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        _initialise(self, layers, width)

    def forward(self, text: Tensor) -> Tensor:
        """Characters [N, window] to logits of the next ones [N, window, characters]."""
        places = torch.arange(text.shape[1], device=text.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.characters(text) + self.positions(places))))
        return logits


class VisionTransformer(nn.Module):
    """A ViT (Dosovitskiy et al. 2021): linear patches, learnt positions, pre-norm blocks, mean, head."""

    def __init__(self, layers: int, width: int, heads: int, *, channels: int, image: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.patches = nn.Linear(channels * patch**2, width)
        self.positions = nn.Embedding((image // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        _initialise(self, layers, width)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, 10]."""
        patches = functional.unfold(images, self.patch, stride=self.patch).mT  # [N, positions, C patch^2]
        hidden = self.blocks(self.patches(patches) + self.positions.weight)
        logits: Tensor = self.head(self.norm(hidden).mean(1))
        return logits


def _initialise(model: nn.Module, layers: int, width: int) -> None:
    """Weights N(0, 1 / width); the last one of a residual branch is smaller by sqrt(2 layers), as in GPT-2.

    The fixed deviation of GPT-2 (Radford et al. 2019), 0.02, is for widths from 768 on.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            continue  # norms start at 1 and 0; biases at 0
        last = name.endswith(("projection.weight", "mlp.2.weight"))
        nn.init.normal_(weight, std=(width * (2 * layers if last else 1)) ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _gpt(size: str, layers: int, width: int, heads: int, window: int, batch: int, epochs: float) -> Problem:
    """The loss is evaluated on about 3,000 characters during a run, and on every work's end after it."""
    return Problem(
        name=f"gpt-shakespeare{size}",
        description=f"{layers} layers x {width}, {window} characters; the loss is in nats a character",
        data="shakespeare",
        architecture=partial(Gpt, layers, width, heads, window),
        window=window,
        batch_size=batch,
        epochs=epochs,
        schedule="cosine",
        warm_up=0.05,
        evaluation_samples=max(12, 3200 // window),
    )


TRANSFORMERS = (
    _gpt("-small", layers=3, width=96, heads=4, window=64, batch=16, epochs=0.0818),  # 400 steps
    _gpt("", layers=6, width=384, heads=6, window=256, batch=64, epochs=16),
    Problem(
        name="vit-digits",
        description="3 layers x 48, patches of 2 x 2 pixels",
        data="digits",
        evaluation_samples=360,
        architecture=partial(VisionTransformer, 3, 48, 4, channels=1, image=8, patch=2),
        batch_size=64,
        epochs=20,
        schedule="cosine",
        warm_up=0.1,
    ),
    Problem(
        name="vit-cifar10",
        description="6 layers x 192, patches of 4 x 4 pixels",
        data="cifar10",
        architecture=partial(VisionTransformer, 6, 192, 6, channels=3, image=32, patch=4),
        batch_size=128,
        epochs=100,
        schedule="cosine",
        warm_up=0.05,
        augmentation="crop and flip",
    ),
)
