"""The Trainer of transformers: `Trainer(..., callbacks=[MinifisherCallback()])`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from minifisher.integrations.outputs import (
    draws_labels,
    flat_numbers,
    observe_outputs,
    refuse_trainer_without_closure,
    unwrap,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle


class MinifisherCallback(TrainerCallback):
    """Draws labels where `fisher` takes them from the model, and logs `diagnostics(flat=True)`.

    The numbers are added to each entry of `trainer.state.log_history`, as often as the trainer logs. `read`
    gets the prediction out of what the model returns; None: its `logits`.
    """

    def __init__(
        self, likelihood: str = "categorical", read: Callable[[Any], Tensor] | None = None, log: bool = True
    ) -> None:
        self.likelihood: str = likelihood
        self.read: Callable[[Any], Tensor] | None = read
        self.log: bool = log
        self._hook: RemovableHandle | None = None
        self._numbers: Mapping[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Register the hook that draws labels; TypeError for K-BFGS: the trainer passes no closure."""
        self.on_train_end(args, state, control)  # training may have ended with an error, without that call
        optimizer = unwrap(kwargs["optimizer"])
        refuse_trainer_without_closure(optimizer)
        if draws_labels(optimizer):
            self._hook = observe_outputs(kwargs["model"], optimizer, self.likelihood, self.read)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the diagnostics while the gradients are there."""
        every = state.logging_steps
        if self.log and every and (state.global_step + 1) % every == 0:
            self._numbers = flat_numbers(unwrap(kwargs["optimizer"]))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add them to what is logged."""
        kwargs["logs"].update(self._numbers)
        if state.log_history:
            state.log_history[-1].update(self._numbers)
        self._numbers = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
