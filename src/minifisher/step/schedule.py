"""When statistics and inverses are due: once in every period of so many steps, at a step that is drawn.

With equal distances between them, statistics would see only a part of data that repeat: of two kinds of
batches in turn, every eighth step sees one kind alone. So the step of each period is drawn, with equal
probabilities. The draw is a function of the number of the period and of nothing else. A resumed run and every
rank draw the same, there is no state, and no period of the data can keep in step with it.

All layers share one draw, and each adds a phase of its own. The phases are spread in proportion to the
entries of the weights, so that in every period all steps have about the same work to do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from minifisher.random_bits import random_bits
from minifisher.statistics.records import BatchGradient

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from minifisher.curvature import Plan

_TURN = 2**64
"""Draws and phases are whole numbers below it; together with it they stand for fractions of a period."""


def statistics_due(plan: Plan, step: int, jitter: bool) -> bool:
    """Whether the coming step reads statistics: once in T1 steps, the first time at once.

    `step` counts the steps taken so far. Without `jitter` always the first step of a period is due.
    """
    every = plan.statistics_every
    return step == due_step(step // every, every, plan.statistics_phase if jitter else None)


def refresh_due(plan: Plan, step: int, jitter: bool) -> bool:
    """Whether the coming step recomputes inverses: once in T2 steps.

    In the first T2 steps the statistics change fast, so every observation is followed by a refresh, as in the
    published code.
    """
    if step < plan.inverse_every:
        return statistics_due(plan, step, jitter)
    every = plan.inverse_every
    return step == due_step(step // every, every, plan.inverse_phase if jitter else None)


@lru_cache(maxsize=2**14)
def due_step(period: int, every: int, phase: int | None) -> int:
    """The step of a period of so many steps that is due; phase=None: always the first."""
    drawn = 0 if phase is None or not period else (random_bits(0, period) + phase) % _TURN * every // _TURN
    return period * every + drawn


def spread_phases(entries: Mapping[Hashable, int]) -> dict[Hashable, int]:
    """A phase for each key: where its entries begin among those of all keys, as a fraction of a period."""
    total, phases, before = sum(entries.values()), {}, 0
    for key, count in entries.items():
        phases[key] = before * _TURN // max(1, total)
        before += count
    return phases


def with_phases(plan: Plan, phase: int) -> Plan:
    """The plan of a layer with this phase.

    The statistics of layers that read samples have one phase: their hooks, and the backward pass from drawn
    labels, serve all of them.
    """
    own = plan.curvature.needs is BatchGradient
    return replace(plan, statistics_phase=phase if own else 0, inverse_phase=phase)
