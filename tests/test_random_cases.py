"""Some hundred random cases; `make fuzz` runs many thousand (tests/fuzz.py)."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from tests.random_cases import Case, cases, check


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(cases())
def test_random_networks_options_and_gradients(case: Case) -> None:
    check(case)
