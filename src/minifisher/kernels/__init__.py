"""Compiled loops, each beside the reference in torch that it agrees with."""
