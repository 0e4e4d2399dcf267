"""Labels drawn from the model under accelerate: one more line than with AdamW."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

import minifisher
from minifisher.integrations.accelerate import observe

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
model, optimizer = accelerator.prepare(model, minifisher.KFAC(model, lr=1e-2))
inputs = torch.randn(256, 8)
targets = (inputs[:, 0] > 0).long()
for epoch in range(60):
    outputs = model(inputs)
    loss = functional.cross_entropy(outputs, targets)
    observe(optimizer, outputs)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    print(f"epoch {epoch} loss {loss.item():.4f}")
