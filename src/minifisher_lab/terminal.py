"""Where commands print; with --json the result goes to the standard output, all else beside it."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

console = Console()


def beside_json(as_json: bool) -> Console:
    """Where progress and tables go: the standard error, if the standard output is for JSON."""
    return Console(stderr=True) if as_json else console


def print_json(content: Any) -> None:
    """Print the content as JSON, whatever the width of the terminal."""
    print(json.dumps(content, indent=1))
