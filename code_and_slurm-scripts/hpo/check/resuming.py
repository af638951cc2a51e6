"""Does an interrupted trial go on where it stopped, to the same end?  And does a pruned one end?"""

from __future__ import annotations

from optuna.trial import TrialState

from hpo.check import live
from hpo.check.bench import Bench
from hpo.check.picking import value_of
from hpo.check.short_trial import Do, Outcome, Reports, ShortTrial, after
from hpo.check.table import progress

QUICK = 10.0  # seconds for another trial with an interruption
NEARLY = 1e-6  # relative difference of results that rounding explains

MOST_NAMES = 4  # of variables that may have been lost

Row = tuple[str, str]  # verdict, text


def pruned(bench: Bench) -> Row:
    """Return the row of trials that should_prune() told to end after their first epoch."""
    whole = bench.whole
    if not whole.asked and whole.ended and len(whole.reports) == 1:
        return "look", "one report alone, at its end: nothing to prune, nor to go on from"
    if not whole.asked:
        return "MEND", (
            "should_prune() is never asked; after each epoch: "
            "if trial.should_prune(): raise optuna.TrialPruned"
        )
    if not bench.ends:
        bench.one_epoch(bench.values)
    if all(outcome.state == TrialState.PRUNED for outcome in bench.ends):
        return "ok", "it ends after the epoch in which should_prune() says yes"
    return "MEND", "should_prune() said yes and the trial went on; then: raise optuna.TrialPruned"


def resumed(bench: Bench) -> Row:
    """Return the row of a trial that was interrupted after its first epoch and went on."""
    whole, trial, first = bench.whole, bench.interrupted, bench.first
    if not whole.asked:
        return "-", "not tried: see prune"
    if first.ended or first.state == TrialState.PRUNED:
        return "MEND", (
            "an interruption is swallowed: no `except:` or `except BaseException:` around "
            "trial.should_prune(), or raise it again there"
        )
    if first.state != TrialState.WAITING:
        return "MEND", f"a trial that is interrupted fails: {first.reason}"
    if more := bench.longer():
        whole, trial, first = more
    progress("the interrupted trial goes on")
    rest = _go_on(trial, first, whole)
    if _began_again(whole, rest) and len(whole.saves) < len(whole.reports) and not first.saves:
        # It saves less often than it reports, or after the question: interrupted after a saving.
        trial = bench.trial(bench.values)
        first = trial.run(lambda reports: Do.STOP if len(reports) > 1 else Do.GO_ON)
        rest = _go_on(trial, first, whole)
    row = _judged(bench, whole, first, rest)
    last = len(whole.reports) - 1
    quick = whole.epoch * last + whole.first_report < min(QUICK, bench.left() / 4)
    if row[0] == "MEND" or last < 2 or not quick:
        return row
    # Once more before its last epoch: what acts later is lost later.
    trial = bench.trial(whole.params)
    first = trial.run(after(last, Do.STOP))
    later = _judged(bench, whole, first, _go_on(trial, first, whole))
    return row if later[0] == "ok" else later


def _go_on(trial: ShortTrial, first: Outcome, whole: Outcome) -> Outcome:
    """Run the rest of an interrupted trial, as far as the uninterrupted one came."""
    last = whole.reports[-1][0]

    def answer(reports: Reports) -> Do:
        return Do.STOP if not whole.ended and reports[-1][0] >= last else Do.GO_ON

    return trial.run(answer)


def _began_again(whole: Outcome, rest: Outcome) -> bool:
    steps = [step for step, _ in whole.reports]
    return len(steps) > 1 and bool(rest.reports) and rest.reports[0][0] <= steps[0]


def _judged(bench: Bench, whole: Outcome, first: Outcome, rest: Outcome) -> Row:
    if rest.state == TrialState.FAIL:
        return "MEND", f"an interrupted trial fails when it goes on: {rest.reason}"
    if _began_again(whole, rest):
        return "MEND", (
            "an interrupted trial began again; checkpoint.load belongs before the epochs, "
            "checkpoint.save before trial.should_prune"
        )
    steps = [step for step, _ in whole.reports]
    done = len(first.reports)
    if not rest.reports and len(steps) > done:
        return "MEND", f"an interrupted trial did not go on {rest.reason}".rstrip()
    went_on = f"interrupted after epoch {done} it went on at epoch {done + 1}"
    if rest.reports and rest.reports[0][0] in steps[done + 1 :] and _ends_alike(whole, rest):
        return "look", (
            f"{went_on}, to the same value, but step {steps[done]} was not reported: did it end "
            "while the trial was being stopped?"
        )
    if rest.reports and rest.reports[0][0] not in steps[1 : done + 1]:
        return "MEND", f"{went_on}, but reported step {rest.reports[0][0]} instead of {steps[done]}"
    lost = _lost(whole, first, rest)
    if gap := _difference(bench, whole, first, rest):
        return _not_the_same(bench, f"{went_on}, but to {gap}", lost, _is_rounding(whole, rest))
    same = f"{went_on}, to the same value after epoch {len(whole.reports)}"
    if not lost and not bench.repeatable:
        return "look", f"{went_on}, to about the same; here, no two trials are quite the same"
    if not lost:
        return _ok(whole, same)
    give = (
        f"what an interrupted trial loses: {', '.join(lost)}; give it to checkpoint.save and load"
    )
    if any(lost.values()) and not (whole.ended and _has_all_epochs(bench, whole)):
        return "MEND", f"{give} ({len(whole.reports)} epochs are the same all the same)"
    return "look", f"{same}; but {give}, if it matters"


def _ok(whole: Outcome, same: str) -> Row:
    """Return the verdict on a trial that has lost nothing, as far as that was tried."""
    if whole.ended and len(whole.reports) == 1:
        return "look", (
            "one report alone, at its end: until then there is nothing that an interrupted trial "
            "could go on from"
        )
    few = whole.ended or len(whole.reports) > 1
    return "ok", same if few else f"{same} (more was not tried)"


def _ends_alike(whole: Outcome, rest: Outcome) -> bool:
    """Whether all that was reported, and the value, are those of the uninterrupted trial."""
    known = dict(whole.reports)
    alike = all(known.get(step) == value for step, value in rest.reports)
    return alike and whole.ended and rest.value == whole.value


def _has_all_epochs(bench: Bench, whole: Outcome) -> bool:
    """Whether no trial has more epochs than this one."""
    if not bench.epochs_name:
        return bench.longest
    return bool(value_of(bench.space[bench.epochs_name], 1.0) <= len(whole.reports))


def _lost(whole: Outcome, first: Outcome, rest: Outcome) -> dict[str, bool]:
    done = len(first.reports)
    if min(len(whole.seen), len(first.seen) + 1) <= done or not rest.seen:
        return {}
    before, at = whole.seen[done - 1], whole.seen[done]
    found = live.lost(before, at, first.seen[done - 1], rest.seen[0], first.kept | rest.kept)
    # After another epoch much is different that only follows from what was lost.
    objects = {name: True for name, is_object in found.items() if is_object}
    reported = {value for _, value in rest.reports[:1]}
    numbers = [n for n, is_object in found.items() if not is_object]
    numbers = [name for name in numbers if rest.seen[0][name].state not in reported]
    return objects or dict.fromkeys(numbers[:MOST_NAMES], False)


def _difference(bench: Bench, whole: Outcome, first: Outcome, rest: Outcome) -> str:
    """Return where the parts compute something else than the whole: "0.5 instead of 0.4", or ""."""
    both = {**dict(first.reports), **dict(rest.reports)}
    for step, value in whole.reports:
        there = both.get(step)
        if there is None:
            return f"no report of step {step}"
        if abs(there - value) > 10 * bench.noise["reports"] or (there != there) != (value != value):
            return f"{there:.6g} instead of {value:.6g} at step {step}"
    if whole.ended and rest.value != whole.value and bench.repeatable:
        return f"the value {rest.value} instead of {whole.value}"
    kept = [*first.saves, *rest.saves]
    if len(kept) == len(whole.saves) and kept and not bench.noise["saves"]:
        alike = all(a == b or a != a for a, b in zip(kept[-1], whole.saves[-1], strict=False))
        return "" if alike else "other weights"
    return ""


def _is_rounding(whole: Outcome, rest: Outcome) -> bool:
    known = dict(whole.reports)
    return bool(rest.reports) and all(
        abs(value - known[step]) <= NEARLY * abs(known[step])
        for step, value in rest.reports
        if step in known
    )


def _not_the_same(bench: Bench, what: str, lost: dict[str, bool], rounding: bool) -> Row:
    if lost:
        return "MEND", f"{what}: not in its checkpoint: {', '.join(lost)}"
    if rounding:
        return "look", f"{what}: the last digits differ"
    if not bench.repeatable:
        return "look", f"{what}; here, no two trials are quite the same"
    return "MEND", (
        f"{what}: something is not in its checkpoint "
        "(a scheduler? a global variable? an iterator over the data that outlives an epoch?)"
    )
