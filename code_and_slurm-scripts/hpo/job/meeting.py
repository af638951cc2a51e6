"""The tasks of one job, which exchange small files in a shared folder: for the preflight.

Slow is not broken: every wait has an end, a task that comes after it is told so, and the folder
stays as long as one of them may be at work in it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpo.files import whole

ARRIVAL = 180.0  # seconds that the first task waits for the last: a container may start slowly
PATIENCE = 60.0  # seconds that a task waits for what the others do at the same time

Facts = dict[str, Any]


class Meeting:
    """One task's side of the meeting."""

    def __init__(self, folder: Path, rank: int, tasks: int) -> None:
        self.folder, self.rank, self.tasks = folder, rank, tasks
        folder.mkdir(exist_ok=True)

    def say(self, topic: str, content: Facts) -> None:
        """Tell the others something, whole or not at all."""
        with whole(self.folder / f"{topic}.{self.rank}") as temporary:
            temporary.write_text(json.dumps(content))

    def hear(self, topic: str, patience: float | None = None) -> dict[int, Facts]:
        """Wait for every task and return what each said, by rank; without those that are mute.

        `patience` is in seconds; PATIENCE without it.
        """
        heard: dict[int, Facts] = {}

        def all_heard() -> bool:
            for rank in set(range(self.tasks)) - set(heard):
                path = self.folder / f"{topic}.{rank}"
                if path.exists():
                    heard[rank] = json.loads(path.read_text())
            return len(heard) == self.tasks

        wait_for(all_heard, PATIENCE if patience is None else patience)
        return heard

    def is_closed(self) -> bool:
        """Whether the others have given up waiting."""
        return (self.folder / "closed").exists()

    def close(self) -> None:
        """Tell who is still to come that it is too late."""
        (self.folder / "closed").touch()

    def leave(self) -> None:
        """Need the folder no more; who is the last to leave removes it."""
        self.say("done", {})
        if self.rank == 0 or self.is_closed():
            # Task 0 waits for those that are on their way out, and for nobody who is late.
            done = self.hear("done", 0.0 if self.is_closed() else PATIENCE)
            if len(done) == self.tasks:
                shutil.rmtree(self.folder, ignore_errors=True)

    def strays(self, facts: dict[int, Facts]) -> str:
        """Return what a task says that has not met task 0, or was too late; "" for all others."""
        me = f"task {self.rank} on {os.uname().nodename}"
        if self.is_closed() and self.rank:
            return f"{me} came after the others had waited {ARRIVAL:.0f} s: its node is slow"
        if 0 not in facts:
            met = f"met only tasks {sorted(facts)} in {self.folder.parent}"
            return f"{me} {met}: put the bundle, and STUDY_DB, where all nodes see it"
        return ""


def wait_for(condition: Callable[[], bool], patience: float) -> bool:
    """Wait until the condition holds, or `patience` seconds are over; return whether it does."""
    end = time.monotonic() + patience
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds
