"""Lightning: `Trainer(callbacks=[MinifisherCallback()])`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from minifisher.integrations.outputs import (
    draws_labels,
    flat_numbers,
    observe_outputs,
    refuse_trainer_without_closure,
    unwrap,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from minifisher.optimizer import CurvatureOptimizer


class MinifisherCallback(Callback):
    """Draws labels where `fisher` takes them from the model, and logs `diagnostics(flat=True)`.

    `module` names the submodule that returns the prediction; None: the module that the optimizer was given.
    `read` gets the prediction out of what it returns. `log_every` counts steps; 0 logs nothing. The labels
    of a resumed run are the same: the checkpoint of the optimizer keeps their random numbers.
    """

    def __init__(
        self,
        likelihood: str = "categorical",
        module: str | None = None,
        read: Callable[[Any], Tensor] | None = None,
        log_every: int = 50,
    ) -> None:
        self.likelihood: str = likelihood
        self.module: str | None = module
        self.read: Callable[[Any], Tensor] | None = read
        self.log_every: int = log_every
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Register the hooks that draw labels; TypeError for K-BFGS with 16-mixed precision."""
        passes_closure = getattr(trainer.precision_plugin, "scaler", None) is None
        for optimizer in _ours(trainer):
            if not passes_closure:
                refuse_trainer_without_closure(optimizer)
            if draws_labels(optimizer):
                module = self._predictor(optimizer, pl_module)
                self._hooks.append(observe_outputs(module, optimizer, self.likelihood, self.read))

    def _predictor(self, optimizer: CurvatureOptimizer, pl_module: nn.Module) -> nn.Module:
        if self.module is not None:
            return pl_module.get_submodule(self.module)
        given = [module for module in optimizer.modules if module is not pl_module]
        if len(given) != 1:
            raise ValueError(
                f"the optimizer was given {len(optimizer.modules)} modules, or the LightningModule itself: "
                'name the submodule that returns the prediction, MinifisherCallback(module="net")'
            )
        return given[0]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the diagnostics: the gradients are cleared only before the next backward pass."""
        if self.log_every and trainer.global_step % self.log_every == 0:
            for number, optimizer in enumerate(_ours(trainer)):
                pl_module.log_dict(flat_numbers(optimizer, f"minifisher{number or ''}"))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self.on_train_end(trainer, pl_module)


def _ours(trainer: Any) -> list[CurvatureOptimizer]:
    found = []
    for optimizer in trainer.optimizers:
        try:
            found.append(unwrap(optimizer))
        except TypeError:  # another optimizer beside it, as in a GAN
            continue
    return found
