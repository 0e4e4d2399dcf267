"""Whom a warning is for: the user's line that called into this package."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import FrameType

_SKIPPED = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


def stacklevel_of_caller() -> int:
    """The `stacklevel` with which `warnings.warn` names the first line outside minifisher and torch.

    Call it in the function that warns. Frames of torch are skipped because `torch.optim` wraps `step`.
    """
    frame: FrameType | None = sys._getframe(1)
    stacklevel = 1
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
        stacklevel += 1
    return stacklevel
