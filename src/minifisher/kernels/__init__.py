"""Compiled loops, each beside the reference in torch that it agrees with."""

import os

PROCESS: int = os.getpid()
"""The process that imported the library; one that it forks does not inherit its threads."""
