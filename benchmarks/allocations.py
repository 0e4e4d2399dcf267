"""How much memory a step needs: what torch allocates on the CPU, as its profiler records it.

It counts right with one thread only: the profiler misses what another thread releases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak(step: Callable[[], object]) -> int:
    """Bytes that are in use at most during a step, beyond what was in use before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))
