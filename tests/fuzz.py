"""Run many random cases, and print what happened to them.

    python tests/fuzz.py [--cases 20000] [--jobs 2] [--seed 0]

Cases are run in batches; the first failure of a batch is made as small as possible and printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 250


def run_batch(seed: int) -> tuple[Counter[tuple[str, str]], str]:
    """Run one batch: how often each method had each outcome, and the smallest failing case, if any."""
    import torch
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from tests.random_cases import Case, cases, check

    torch.set_num_threads(1)
    counts: Counter[tuple[str, str]] = Counter()
    last: list[str] = []
    options = settings(
        max_examples=BATCH,
        derandomize=False,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    @seeded(seed)
    @options
    @given(cases())
    def run(case: Case) -> None:
        try:
            counts[case.method, check(case)] += 1
        except Exception as error:
            last[:] = [f"{case}\n    {type(error).__name__}: {error}"]
            raise

    try:
        run()
    except Exception:
        counts["all methods", "failed batch"] += 1
        return counts, last[0]
    return counts, ""


def main() -> None:
    """Run and report; the exit status is 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start, total, failures = time.monotonic(), Counter(), set()
    seeds = range(arguments.seed, arguments.seed + -(-arguments.cases // BATCH))
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for counts, failure in pool.imap_unordered(run_batch, seeds):
            total += counts
            if failure and failure not in failures:
                failures.add(failure)
                print(f"failed: {failure}", flush=True)
    print(f"{sum(total.values()):,} cases in {time.monotonic() - start:.0f} s")
    for (method, outcome), count in sorted(total.items()):
        print(f"  {method:12s} {outcome:16s} {count:6,}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
