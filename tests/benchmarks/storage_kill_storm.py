"""The kill storm on our storage, on both engines, and on stock Optuna with heartbeat and retry.

    python tests/benchmarks/storage_kill_storm.py [SEED]        takes about eight minutes

PostgreSQL takes part where Debian's package is installed, and root asks.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "code_and_slurm-scripts"), str(ROOT / "tests" / "helpers")]

from optuna.study import StudyDirection  # noqa: E402

from hpo.study.engines.postgresql import PostgreSQL  # noqa: E402
from hpo.study.storage import StudyStorage  # noqa: E402
from postgresql_server import PostgreSQLServer, wanted  # noqa: E402
from storage_helpers import NAME  # noqa: E402
from storage_storm import (  # noqa: E402
    KILLS,
    TRIALS,
    WORKERS,
    print_table,
    storm_ours,
    storm_stock,
)


@contextmanager
def study_on_a_server(folder: Path) -> Iterator[Path]:
    """Give a file with the URL of a new study on a server of its own."""
    server = PostgreSQLServer(Path(f"/tmp/pg-{os.getpid()}"))
    path = folder / "study.url"
    path.write_text(server.empty("study"))
    storage = StudyStorage(PostgreSQL(path.read_text()))
    storage.create_new_study([StudyDirection.MINIMIZE], NAME)
    storage.remove_session()
    try:
        yield path
    finally:
        server.stop()
        shutil.rmtree(server.folder)


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    results = []
    if why := wanted():
        print(f"without PostgreSQL, which {why}")
    else:
        with tempfile.TemporaryDirectory() as folder, study_on_a_server(Path(folder)) as path:
            results.append(storm_ours(Path(folder), seed, path=path, name="PostgreSQL"))
        print_table(results[-1:])
    for storm in (storm_ours, storm_stock):
        with tempfile.TemporaryDirectory() as folder:
            results.append(storm(Path(folder), seed))
        print_table(results[-1:])
    print(f"\n{KILLS} SIGKILLs, {WORKERS} workers, {TRIALS} trials, seed {seed}:")
    print_table(results)


if __name__ == "__main__":
    main()
