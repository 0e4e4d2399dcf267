"""The factor by which a `torch.amp.GradScaler` multiplied the loss, while it drives a step."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch.amp import GradScaler


class DrivenByScaler:
    """The attribute `_step_supports_amp_scaling`: True for a GradScaler that reads it, False for all others.

    `GradScaler.step` reads the attribute. If it is True, the scaler calls `optimizer.step` in every case and
    tells it the scale of the loss, which samples of the training loss carry. Lightning reads it too, and
    refuses gradient clipping if it is True: it concludes that gradients cannot be unscaled before the step.
    They can. So Lightning gets False, calls `unscale_`, clips, and hands the step to the scaler.

    After `unscale_` the scaler does not tell the scale. Therefore the scaler that reads the attribute is
    remembered: it is the variable `self` of the calling frame. A scaler of another class gets False, and
    does as for torch.optim.SGD: it unscales every `.grad`, and leaves the step out at an infinity.
    """

    def __get__(self, optimizer: Any, owner: type | None = None) -> bool:
        caller = sys._getframe(1).f_locals.get("self")
        if optimizer is None or not isinstance(caller, GradScaler):
            return False
        optimizer.__dict__["_scaler"] = weakref.ref(caller)
        return True


def scale_of_driver(optimizer: Any) -> float | None:
    """The scale of the GradScaler that drives the running step; None if there is none, or not torch's."""
    if not hasattr(optimizer, "found_inf"):  # the scaler sets it for the duration of the step
        return None
    remembered = optimizer.__dict__.get("_scaler")
    scaler = remembered() if remembered is not None else None
    return float(scaler.get_scale()) if scaler is not None else None
