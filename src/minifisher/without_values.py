"""Steps on tensors without values: on the meta device, and fake tensors, as memory planners use them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_NUMBERS = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__)


def has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and a dtype, but no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class UsualAnswers(TorchFunctionMode):
    """Answers what the library asks of tensors without values as in a usual step, and changes nothing else.

    There all numbers are finite and not zero, and no matrix needs special treatment: `condition.all()` holds,
    `condition.any()` does not, and every number that is read is 1.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer a question about values; all else is torch's."""
        asked = args[0] if args and isinstance(args[0], Tensor) and has_no_values(args[0]) else None
        if asked is not None and func is Tensor.any and len(args) == 1:
            return False
        if asked is not None and func in _NUMBERS:
            return _ones(asked.dtype, asked.shape)
        return func(*args, **(kwargs or {}))


def _ones(dtype: torch.dtype, shape: Sequence[int]) -> Any:
    """1 of the Python type that belongs to `dtype`, in nested lists [*shape]."""
    if shape:
        return [_ones(dtype, shape[1:]) for _ in range(shape[0])]
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
