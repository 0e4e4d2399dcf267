"""Lightning with mixed precision, gradient clipping, and labels drawn from the model."""

import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import minifisher
from minifisher.integrations.lightning import MinifisherCallback


class Classifier(lightning.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        """The loss of a batch."""
        loss = functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        if index == 0:
            print(f"epoch {self.current_epoch} loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return minifisher.KFAC(self.net, lr=1e-2)


torch.manual_seed(0)
inputs = torch.randn(256, 8)
batches = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=32)
trainer = lightning.Trainer(
    max_epochs=12,
    accelerator="cpu",
    precision="bf16-mixed",
    gradient_clip_val=1.0,
    callbacks=[MinifisherCallback()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), batches)
