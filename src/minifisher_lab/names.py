"""Look up an entry by its name; the error for an unknown name lists similar names."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Entry = TypeVar("Entry")


class UnknownNameError(ValueError):
    """A name that is not in the table; the message lists similar names."""


def look_up(kind: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of that name. The error for an unknown name lists similar names, or else all names."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name.lower(), table, n=4, cutoff=0.5)
    hint = f"did you mean {_either(near)}?" if near else f"there are: {', '.join(table)}."
    raise UnknownNameError(f"Unknown {kind} {name!r}: {hint}")


def listed(text: str | None) -> list[str] | None:
    """The names of a text, which are separated by commas; None where there is no text."""
    return [name.strip() for name in text.split(",")] if text else None


def _either(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
