"""The kill storm on our storage and on stock Optuna with heartbeat and retry; a table of both.

python tests/benchmarks/storage_kill_storm.py [SEED]        takes about six minutes
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "code_and_slurm-scripts"), str(ROOT / "tests" / "helpers")]

from storage_storm import (  # noqa: E402
    KILLS,
    TRIALS,
    WORKERS,
    print_table,
    storm_ours,
    storm_stock,
)


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    results = []
    for storm in (storm_ours, storm_stock):
        with tempfile.TemporaryDirectory() as folder:
            results.append(storm(Path(folder), seed))
        print_table(results[-1:])
    print(f"\n{KILLS} SIGKILLs, {WORKERS} workers, {TRIALS} trials, seed {seed}:")
    print_table(results)


if __name__ == "__main__":
    main()
