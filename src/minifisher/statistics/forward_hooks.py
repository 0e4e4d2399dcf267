"""The forward hooks of a capture on the modules of others, which neither see nor leave a trace there."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from minifisher.statistics.compiled_hooks import number_of, record

if TYPE_CHECKING:
    from collections.abc import Callable

    from minifisher.statistics.calls import PendingCall

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # new in torch 2.7


class Recorder(Protocol):
    """What hooks tell of the calls of their modules."""

    def record_call(self, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Record a call of a module in eager mode."""

    def record_compiled_call(self, module: nn.Module, inputs: Tensor) -> PendingCall:
        """Record a call of a module in compiled code, which has to keep the result alive."""

    def record_compiled_gradient(self, number: int, gradients: Tensor) -> None:
        """Record the output gradient of the compiled call with that number."""


class Switch:
    """Tells every hook of one capture, eager or compiled, whether to record."""

    def __init__(self) -> None:
        self.on: bool = False
        self.settings: ExitStack[bool | None] = ExitStack()
        """Settings of torch that hold while it is on."""

    def turn_off(self) -> None:
        """Record no more."""
        self.on = False
        self.settings.close()


class ForwardHook:
    """The hook that is registered on a module; on another module, to which somebody moved it, it is idle."""

    def __init__(self, recorder: Recorder, module: nn.Module, switch: Switch) -> None:
        self._recorder, self._module = weakref.ref(recorder), weakref.ref(module)
        self._switch = switch
        self._number = number_of(self)

    def __call__(self, module: nn.Module, *call: Any) -> Tensor | None:
        """`call` is (args, kwargs, output), or (args, output) where quantisation registered it anew."""
        if not self._switch.on or len(call) != 3 or not isinstance(call[2], Tensor):
            return None
        args, kwargs, output = call
        inputs = args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
        if torch.compiler.is_compiling():
            needed = output.requires_grad and module.weight.requires_grad and not _is_exporting()
            return record(output, inputs.detach().to(output.dtype), self._number) if needed else None
        recorder = self._recorder()
        if recorder is not None and self._module() is module:
            recorder.record_call(module, inputs, output)
        return None

    def receive_input(self, inputs: Tensor) -> tuple[int, object]:
        """Called by compiled code in the forward pass."""
        recorder, module = self._recorder(), self._module()
        call = recorder.record_compiled_call(module, inputs) if recorder and module else None
        return -1 if call is None else call.number, call

    def receive_gradient(self, call: int, gradients: Tensor) -> None:
        """Called by compiled code in the backward pass."""
        recorder = self._recorder()
        if recorder:
            recorder.record_compiled_gradient(call, gradients)

    @property
    def __name__(self) -> str:
        raise AttributeError(
            "torch.jit.script cannot compile the forward hooks of an optimizer: script a fresh model with "
            "the same state_dict, or use torch.export"
        )


def put_on(module: nn.Module, hook: ForwardHook) -> Callable[[], None]:
    """Register the hook; returns what removes it.

    It comes before the hooks of others, which may change the output that the layer itself has computed. A
    saved or copied module has no trace of it: files can be read where this package is not installed.
    """
    handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
    # Pickle and copy look for this name on the instance. One function serves the hooks of all optimizers.
    vars(module).setdefault("__getstate__", _StateWithoutHooks(module))
    reference = weakref.ref(module)

    def remove() -> None:
        handle.remove()
        held = reference()
        if held is not None and not any(isinstance(h, ForwardHook) for h in held._forward_hooks.values()):
            vars(held).pop("__getstate__", None)

    return remove


class _StateWithoutHooks:
    """The `__getstate__` of a module with hooks: what its class would give, without the hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self) -> Any:
        module = self._module()
        own = getattr(type(module), "__getstate__", None)  # of object only since Python 3.11
        state = vars(module) if own is None else own(module)
        if not isinstance(state, dict) or "_forward_hooks" not in state:
            return state
        ours = {key for key, hook in state["_forward_hooks"].items() if isinstance(hook, ForwardHook)}
        kept = {name: value for name, value in state.items() if name != "__getstate__"}
        for name in ("_forward_hooks", "_forward_hooks_with_kwargs"):
            hooks = kept[name]
            kept[name] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in ours)
        return kept
