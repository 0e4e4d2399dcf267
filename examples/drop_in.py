"""MBF where AdamW stood, on scikit-learn's digits: `python examples/drop_in.py`."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import minifisher

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

optimizer = minifisher.MBF(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20)

for epoch in range(20):
    for batch in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    schedule.step()
    print(f"epoch {epoch}: loss of the last batch {loss.item():.4f}")
print(optimizer.describe())
