"""--check and what a trial loses when it is interrupted: named, and no more than that."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from checked import CLOCK, NET, Checker, check, lines
from hpo.check.afresh import Kept
from hpo.check.live import Seen, lost

__all__ = ["check"]
COSINE = 'scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"])'
STEP = "scheduler = torch.optim.lr_scheduler.StepLR(optimizer, {}, 0.1)"
EMA = "ema = torch.optim.swa_utils.AveragedModel(model)"
EMA_LOSS = "ema.update_parameters(model)\nloss = float((ema(x) - y).square().mean())"
GENERATOR = "generator = torch.Generator().manual_seed(1)"
LATE = "if epoch >= 3:\n    noise = float(torch.randn((), generator=generator))"
FAST_FORWARD = COSINE + "\nfor _ in losses:\n    scheduler.step()"


def test_what_is_saved_is_found_to_be_there(check: Checker) -> None:
    status, table, _ = check(NET)
    assert status == 0
    assert table["one trial"].startswith("ok 4 epochs in")
    assert table["resume"] == (
        "ok interrupted after epoch 1 it went on at epoch 2, to the same value after epoch 8"
    )


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ({"before": COSINE, "after": "scheduler.step()"}, "scheduler (CosineAnnealingLR)"),
        ({"before": STEP.format(3), "after": "scheduler.step()"}, "scheduler (StepLR)"),
        ({"before": STEP.format(6), "after": "scheduler.step()"}, "scheduler (StepLR)"),
        ({"before": EMA, "after": EMA_LOSS}, "ema (AveragedModel)"),
        ({"before": GENERATOR, "epoch": LATE}, "generator (Generator)"),
        ({"before": "ema = copy.deepcopy(model)", "after": "for mine, other in zip(ema.parameters()"
          ", model.parameters()):\n    mine.data.lerp_(other.data, 0.1)\n"
          "loss = float((ema(x) - y).square().mean())"}, "ema (Linear)"),
    ],
)  # fmt: skip
def test_what_no_checkpoint_holds_is_named(
    check: Checker, places: dict[str, str], named: str
) -> None:
    status, table, _ = check(NET, *lines(**places))
    assert status == 1
    assert table["resume"].startswith("MEND ")
    assert table["resume"].endswith(f"not in its checkpoint: {named}")


def test_what_earlier_trials_have_left_alive_hides_nothing(check: Checker) -> None:
    """As by a library that keeps all schedulers in a list: gc's objects begin with the oldest."""
    kept = f'{STEP.format(3)}\nkept = torch.__dict__.setdefault("kept", [])\nkept.append(scheduler)'
    places = {
        "before": f"{kept}\ndel scheduler",
        "after": "kept[-1].step()\nimport gc\ngc.collect()",
    }
    status, table, _ = check(NET, *lines(**places))
    assert status == 1
    assert table["resume"].startswith("MEND ")
    assert table["resume"].endswith("not in its checkpoint: StepLR")


def test_what_a_process_keeps_is_no_checkpoint(check: Checker) -> None:
    """The check's resumed trial runs in the same process; in a study, in another one."""
    step = ("def train_model", "STEP = 0\ndef train_model")
    first = ("    torch.manual_seed(0)", "    global STEP\n    torch.manual_seed(0)")
    act = "STEP += 1\noptimizer.param_groups[0]['lr'] = config['lr'] * 0.7 ** STEP"
    loaded = lines(loaded="if not losses: STEP = 0", epoch=act)
    status, table, _ = check(NET, step, first, *loaded)
    assert status == 1
    assert table["resume"].startswith("MEND interrupted after epoch 1 it went on at epoch 2, but")
    assert table["resume"].endswith("not in its checkpoint: STEP")


def test_what_is_loaded_once_for_all_trials_is_no_mistake(check: Checker) -> None:
    data = """DATA, CALLS = None, 0
def data():
    global DATA, CALLS
    CALLS += 1
    if DATA is None:
        print('loads')
        DATA = torch.ones(64, 4)
    return DATA

def train_model"""
    used = ("torch.randn(64, 4)", "torch.randn(64, 4) + data()")
    status, table, printed = check(NET, ("def train_model", data), used)
    assert status == 0
    assert table["resume"].startswith("ok ")
    assert 1 < printed.count("loads") < 5  # at first, and in what stands for another process


def test_kept_is_as_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_users_module.py").write_text("""
import functools, torch
class Run:
    step, seen, on = 0, [1, {"a": (2,)}], False
    def __call__(self, trial, more):
        self.step += 1
        Run.step += 1
        Run.seen.append(7)
        Run.seen[1]["a"] = 3
        more["n"] = 1
        count()
        globals().update(best=0.5, cache={1: torch.ones(1)}, data="loaded", words=[2])
        Run.on = True
run, best, cache, data, words = Run(), 9.0, {}, None, [1]
def count(calls=[]):
    calls.append(1)
    count.calls = len(calls)
count.calls = 0
itself = [1]
itself.append(itself)
objective = functools.partial(run, more={})
""")
    module = importlib.import_module("a_users_module")
    words, kept = module.words, Kept(module.objective)
    for new_process in (False, True):
        module.objective(None)
        kept.put_back(new_process)
        assert module.Run.step == module.count.calls == 0
        assert "step" not in vars(module.run)
        assert module.count.__defaults__ == ([],)
        assert module.Run.seen == [1, {"a": (2,)}]
        assert module.objective.keywords == {"more": {}}
        assert module.best == 9.0
        assert module.words is words == [1]
        assert module.Run.on  # a switch: what it has begun is there, in this process
        assert (module.data, bool(module.cache)) == (
            (None, False) if new_process else ("loaded", True)
        )


def test_what_cannot_be_named_is_found(check: Checker) -> None:
    later = lines(before="noises = iter(range(99))", epoch="noise = float(next(noises))")
    status, table, _ = check(NET, *later)
    assert status == 1
    assert table["resume"].startswith(
        "MEND interrupted after epoch 1 it went on at epoch 2, but to"
    )


def test_a_schedule_that_is_brought_up_to_date_is_no_mistake(check: Checker) -> None:
    forward = lines(
        before="twin = torch.optim.SGD(model.parameters(), lr=config['lr'])",
        loaded=FAST_FORWARD.replace("(optimizer", "(twin"),
        after="scheduler.step()\noptimizer.param_groups[0]['lr'] = scheduler.get_last_lr()[0]",
    )
    status, table, _ = check(NET, *forward)
    assert status == 0
    assert table["resume"].startswith("ok ")


def test_a_schedule_that_never_acts_is_a_remark(check: Checker) -> None:
    status, table, _ = check(NET, *lines(before=STEP.format(99), after="scheduler.step()"))
    assert status == 0
    assert table["resume"].startswith("look ")
    assert "scheduler (StepLR)" in table["resume"]


def test_it_is_a_mistake_where_longer_trials_were_not_tried(check: Checker) -> None:
    long = ("[4, 8]", "[4, 100_000]"), ("\nif __name__", CLOCK)
    after = "scheduler.step()\nclock.epoch(10)"
    status, table, _ = check(NET, *long, *lines(before=STEP.format(99), after=after))
    assert status == 1
    assert "scheduler (StepLR)" in table["resume"]


def test_a_variable_that_counts_is_a_remark(check: Checker) -> None:
    status, table, _ = check(NET, *lines(before="best, calls = 1e9, 0", after="calls += 1"))
    assert status == 0
    assert table["resume"].startswith("look ")
    assert "calls" in table["resume"]
    assert "best" not in table["resume"]


def test_lost_is_what_changes_alike_and_then_does_not() -> None:
    def seen(**numbers: float) -> dict[str, Seen]:
        return {name: Seen(False, number) for name, number in numbers.items()}

    first = seen(epoch=0, best=9, start=0, clock=1, twice=1)
    second = seen(epoch=1, best=8, start=0, clock=2, twice=2)
    again = seen(epoch=0, best=9, start=0, clock=7, twice=1)
    resumed = seen(epoch=1, best=8.5, start=1, clock=8)
    assert lost(first, second, again, resumed) == {"best": False}


def test_what_never_computes_the_same_is_not_called_the_same(check: Checker) -> None:
    noisy = ("        losses.append(loss)", "        import os\n        losses.append(loss + "
             "int.from_bytes(os.urandom(4), 'big') / 2**32)")  # fmt: skip
    status, table, _ = check(NET, noisy)
    assert status == 0
    assert table["resume"].startswith("look interrupted after epoch ")
    assert "no two trials are quite the same" in table["resume"]


def test_one_report_at_the_end_is_nothing_to_go_on_from(check: Checker) -> None:
    once = ('"epochs": trial.suggest_categorical("epochs", [4, 8]),', "")
    status, table, _ = check(NET, once, ('config["epochs"]', "1"))
    assert status == 0
    assert table["resume"].startswith("look one report alone, at its end: ")
