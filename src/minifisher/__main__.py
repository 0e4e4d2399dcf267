"""`python -m minifisher` is the command line of the laboratory."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("minifisher_lab", run_name="__main__", alter_sys=True)
