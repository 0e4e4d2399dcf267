"""Bytes of optimizer state per parameter, from the state itself after one step."""

from __future__ import annotations

import torch
from alternate import report
from step_time import NETWORKS

import minifisher

CHOICES: dict[str, dict[str, object]] = {
    "default": {},
    "kernel blocks": {"conv_blocks": "kernel"},
    "kernel blocks, bfloat16 curvature": {"conv_blocks": "kernel", "curvature_dtype": torch.bfloat16},
}


def bytes_per_parameter(name: str, options: dict[str, object]) -> float:
    network = NETWORKS[name][0]()
    optimizer = minifisher.MBF(network, **options)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = (t for entry in optimizer.state.values() for t in entry.values() if torch.is_tensor(t))
    return round(sum(t.nbytes for t in tensors) / sum(p.numel() for p in network.parameters()), 2)


def main() -> None:
    report(
        {
            name: {choice: bytes_per_parameter(name, options) for choice, options in CHOICES.items()}
            for name in ("five-layer", "resnet32", "autoencoder")
        }
    )


if __name__ == "__main__":
    main()
