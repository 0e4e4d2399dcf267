from __future__ import annotations

from minifisher.random_bits import random_bits


def test_splitmix64_gives_the_published_numbers() -> None:
    """The first outputs for seed 0, of the authors' C code."""
    assert random_bits(0) == 0xE220A8397B1DCDAF
    assert random_bits(0, 2) == random_bits(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
