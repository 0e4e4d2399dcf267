"""Timing on a machine that others use too: rivals take turns, and only ratios within a turn are compared."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Processor time of one thread says what the work costs where neighbours keep the machine busy."""


def alternate(
    rivals: Mapping[str, Callable[[], object]], turns: int, clock: str = "wall", rest: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of every rival in every turn; each turn starts with another rival.

    After `rest` seconds the threads that spin for a while behind a rival's last work no longer take
    processors from the next one.
    """
    now = CLOCKS[clock]
    for rival in rivals.values():
        rival()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    for _ in range(turns):
        order = [*order[1:], order[0]]
        for name in order:
            time.sleep(rest)
            started = now()
            rivals[name]()
            seconds[name].append(now() - started)
    return seconds


def compare(seconds: Mapping[str, list[float]], baseline: str, work: int = 1) -> dict[str, dict[str, float]]:
    """Milliseconds a unit of work, least and median, and the ratios to the baseline.

    `ratio` is the median over turns of the ratio within a turn; `ratio_of_least` compares the least times,
    which is what remains where neighbours disturb single turns.
    """
    table = {}
    for name, times in seconds.items():
        ratios = [own / base for own, base in zip(times, seconds[baseline], strict=True)]
        table[name] = {
            "least_ms": round(1000 * min(times) / work, 4),
            "median_ms": round(1000 * statistics.median(times) / work, 4),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_of_least": round(min(times) / min(seconds[baseline]), 4),
        }
    return table


def machine() -> dict[str, Any]:
    """Where and when it was measured."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def report(results: Mapping[str, Any]) -> None:
    """The results, with command and machine, as one JSON object on standard output."""
    command = " ".join(["python", *sys.argv])
    print(json.dumps({"command": command, "machine": machine(), **results}, indent=1))
