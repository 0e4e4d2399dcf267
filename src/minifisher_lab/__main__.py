"""The command `minifisher`. If a package of the extra `lab` is missing, it says how to install it."""

from __future__ import annotations

import sys

LABORATORY = frozenset(
    (
        *("jinja2", "matplotlib", "numpy", "optuna", "PIL", "pooch", "psutil", "rich"),
        *("scipy", "sklearn", "typer"),
    )
)
"""What the extra `lab` installs, by import name."""


def main() -> None:
    """Run the command line."""
    try:
        from minifisher_lab.cli import app

        app(prog_name="minifisher")
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports Ctrl-C
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LABORATORY:
            raise
        sys.exit(f"The command line needs {error.name}: pip install 'minifisher[lab]'")


if __name__ == "__main__":
    main()
