"""The true Fisher matrix, with labels drawn from the model: `python examples/sampled_fisher.py`."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import minifisher

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
labels = torch.tensor(digits.target)
model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))

# The module, not its parameters: this estimator looks inside the backward pass.
optimizer = minifisher.MBF(model, lr=1e-3, fisher="sampled")

for epoch in range(10):
    for batch in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        outputs = model(images[batch])
        optimizer.observe(outputs)  # an extra backward pass, when one is due
        loss = nn.functional.cross_entropy(outputs, labels[batch])
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss of the last batch {loss.item():.4f}")
