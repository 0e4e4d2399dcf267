"""Looking things up by name, with the near ones at hand when a name is unknown."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Entry = TypeVar("Entry")


class UnknownNameError(ValueError):
    """A name that stands in no table; the message lists the near ones."""


def look_up(kind: str, name: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of that name, or an error that lists the near names (all of them when none is near)."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name.lower(), table, n=4, cutoff=0.5)
    hint = f"did you mean {_either(near)}?" if near else f"there are: {', '.join(table)}."
    raise UnknownNameError(f"Unknown {kind} {name!r}: {hint}")


def _either(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
