"""Random bits that depend on given numbers alone: there is no state, so a resumed run draws the same."""

from __future__ import annotations

_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MASK = 2**64 - 1


def random_bits(seed: int, draw: int = 1) -> int:
    """The number of 64 bits that the generator splitmix64 gives in its `draw`-th draw; the first one is 1.

    Every bit of it depends on every bit of `seed`. Source: Steele, Lea, Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014.
    """
    number = (seed + draw * _STEP) & _MASK
    for shift, factor in _ROUNDS:
        number = ((number ^ (number >> shift)) * factor) & _MASK
    return number ^ (number >> 31)
