"""The state of a parameter, as a dictionary that notes when somebody else writes to it."""

from __future__ import annotations

from typing import Any


class Changes:
    """Whether any entry of an optimizer's state was written to from outside."""

    noted = False


class Entry(dict[str, Any]):
    """What `optimizer.state[parameter]` holds. The engine writes with `dict` methods, which note nothing.

    Tensors of equal layers are views of one stack. An assignment puts another tensor in the place of a view;
    the note tells the next step to form the stacks anew.
    """

    __slots__ = ("_changes",)

    def __init__(self, values: dict[str, Any], changes: Changes) -> None:
        super().__init__(values)
        self._changes = changes

    def __setitem__(self, name: str, value: Any) -> None:
        self._changes.noted = True
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._changes.noted = True
        super().__delitem__(name)

    def update(self, *values: Any, **named: Any) -> None:
        """As of a dictionary."""
        self._changes.noted = True
        super().update(*values, **named)

    def __ior__(self, values: Any) -> Entry:  # type: ignore[override,misc]
        self.update(values)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As of a dictionary."""
        self._changes.noted = True
        return super().setdefault(name, default)

    def pop(self, *arguments: Any) -> Any:
        """As of a dictionary."""
        self._changes.noted = True
        return super().pop(*arguments)

    def popitem(self) -> tuple[str, Any]:
        """As of a dictionary."""
        self._changes.noted = True
        return super().popitem()

    def clear(self) -> None:
        """As of a dictionary."""
        self._changes.noted = True
        super().clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is a plain dictionary."""
        return dict, (dict(self),)
