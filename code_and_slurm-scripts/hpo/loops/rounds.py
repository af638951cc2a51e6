"""Rounds of boosting as steps: what the callbacks of XGBoost and LightGBM have in common.

Every `every` rounds the metric is reported, the model is saved in the trial's own folder, and the
trial may be pruned, or go back to the queue because its worker has to stop.  A trial that goes on
begins after the last model that was saved, with the history of the metric.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna

from hpo import checkpoint
from hpo.files import whole
from hpo.settings import UserError


class Rounds:
    """The rounds of a trial: the metric after each, and the file of the model."""

    def __init__(self, trial: optuna.Trial, every: int, patience: int, final: str) -> None:
        """Find what an interrupted run has left.

        Args:
            trial: the one that runs.
            every: rounds from one saving to the next.
            patience: rounds without a better metric that end the training; 0 for no such end.
            final: the name of the finished model's file in the trial's folder.
        """
        self.trial, self.every, self.patience = trial, every, patience
        self.final = checkpoint.folder(trial) / final
        self.history = checkpoint.load(trial)  # of the metric, one for each round
        self.before = len(self.history)  # rounds that an interrupted run has done
        self.total = 0  # rounds of the whole trial, once they are known

    @property
    def done(self) -> int:
        """Rounds that are finished."""
        return len(self.history)

    @property
    def saved(self) -> Path | None:
        """Where the model of an interrupted run is; None for a trial that is new."""
        return self._path(self.before) if self.before else None

    @property
    def best(self) -> int:
        """The round, from 0, after which the metric was best."""
        maximize = self.trial.study.direction == optuna.study.StudyDirection.MAXIMIZE
        return self.history.index((max if maximize else min)(self.history))

    @property
    def value(self) -> float:
        """The trial's value: the metric after the last round; with `patience`, the best one."""
        return self.history[self.best if self.patience else -1]

    def left(self, total: int) -> int:
        """Return how many of `total` rounds are still to be done."""
        if total <= self.before:
            raise UserError(
                f"trial {self.trial.number} has done {self.before} rounds, and shall have {total}: "
                "was the script edited since?"
            )
        self.total = total
        return total - self.before

    def begins_anew(self) -> bool:
        """Whether a trial that is interrupted may go on from here."""
        return self.done > 0 and self.done % self.every == 0

    def add(self, value: float, write: Callable[[Path], object]) -> bool:
        """Note the metric of a round that has ended; return whether it is the last one.

        Args:
            value: the metric.
            write: writes the model as it is now into a file.

        Raises:
            optuna.TrialPruned: the pruner sees no chance for this configuration.
        """
        if not self.total:
            raise UserError("give the training callback.left(rounds), not the number of rounds")
        self.history.append(value)
        no_better = self.done - 1 - self.best if self.patience else -1
        last = self.done == self.total or no_better >= self.patience
        if last or self.begins_anew():
            self.trial.report(value, self.done - 1)
        if not last and self.begins_anew():
            self._save(write)
            if self.trial.should_prune():
                raise optuna.TrialPruned
        return last

    def _save(self, write: Callable[[Path], object]) -> None:
        """Write the model, then the state that names it; a half-written one never counts."""
        path = self._path(self.done)
        with whole(path) as temporary:
            write(temporary)
        checkpoint.save(self.trial, losses=self.history)
        for other in path.parent.glob("rounds-*"):
            if other != path:
                other.unlink()

    def finish(self, write: Callable[[Path], object]) -> None:
        """Write the finished model, which is kept as long as the trial is a good one."""
        with whole(self.final) as temporary:
            write(temporary)

    def _path(self, done: int) -> Path:
        return self.final.with_name(f"rounds-{done:06d}{self.final.suffix}")


def pick(metric: str, found: dict[str, float]) -> float:
    """Return the metric of that name, or the last one. Raises UserError without it."""
    if not found or (metric and metric not in found):
        what = ", ".join(found) or "none: give it data to evaluate on"
        raise UserError(f"metric={metric!r}: those of the last data set are {what}")
    return found[metric] if metric else list(found.values())[-1]
