"""Whom a warning is for: the user's line that called into this package."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import FrameType

_SKIPPED = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


def warn_caller(message: str) -> None:
    """A RuntimeWarning at the first line outside minifisher and torch, whose `torch.optim` wraps `step`.

    Python's default filter shows a warning once for each line of code. Two optimizers may step in one line,
    and each has to warn for itself: who calls this sees to it that it warns only once.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
    if frame is None:  # everything is inside: a thread of torch, say
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return
    place = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__", "<string>")
    warnings.warn_explicit(message, RuntimeWarning, *place, registry={})
