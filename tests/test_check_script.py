"""python SCRIPT --check: what a script does wrong is found and named, what it does well is not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from checked import CLOCK, PATIENT, TOY, Checker, check, rows
from common import BUNDLE, SCRIPTS, Run
from hpo.check import short_trial
from hpo.drain import Drained

__all__ = ["check"]
STUDY = (BUNDLE / "tests" / "plain_training" / "my_study.py").read_text()
DATA = ('"../data"', f'"{BUNDLE}/data"')
FEW = ("range(50_000, 60_000)", "range(50_000, 50_200)")  # or a validation takes seconds
BY_THE_CLOCK = ("\nif __name__", CLOCK)
SLOW = "        clock.epoch({})\n        losses.append("


def test_the_example_passes(run: Run, own_study: Path) -> None:
    script = str(SCRIPTS / "optuna_mnist.py")
    result = run(PATIENT, script, "--check", PYTHONPATH=str(SCRIPTS))
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    table = rows(result.stdout)
    assert table["resume"].startswith("ok interrupted after epoch 1 it went on at epoch 2, to the")
    for name in ("lr", "batch_size", "conv1_channels", "conv2_channels", "kernel1", "kernel2",
                 "fc_dim"):  # fmt: skip
        assert re.fullmatch(r"ok \S+ instead of \S+ changes the result", table[name]), name
    assert table["epochs"].startswith("ok ")
    assert re.match(r"about \S+ (s|min|h) per trial of 3 epochs on this CPU", table["time"])
    assert re.match(r"about \d\.\d GB", table["memory"])
    assert not list(own_study.parent.iterdir())  # no study.db, no checkpoints


def test_a_script_with_a_data_loader(check: Checker) -> None:
    status, table, _ = check(STUDY, DATA, FEW)
    assert status == 0
    assert list(table) == ["one trial", "prune", "resume", "channels", "dropout", "lr", "epochs",
                           "time", "memory"]  # fmt: skip
    assert {text.split()[0] for text in table.values()} == {"ok", "about"}


def test_what_is_wrong_in_a_script_with_a_data_loader(check: Checker) -> None:
    unread = ('Net(config["channels"], config["dropout"])', 'Net(16, config["dropout"])')
    dead = ("nn.Dropout(dropout)", "nn.Dropout(0.1)")
    unsaved = ("        checkpoint.save(trial, model, optimizer, losses)\n", "")
    status, table, _ = check(STUDY, DATA, FEW, unread, dead, unsaved)
    assert status == 1
    assert table["channels"].startswith("MEND suggested, but train_model never reads config[")
    assert re.match(r"look train_model reads it, but \S+ instead of 0 changes", table["dropout"])
    assert table["resume"].startswith("MEND an interrupted trial began again")


@pytest.mark.parametrize(
    ("old", "new", "name", "finding"),
    [
        ("", "", "layers", "ok 3 instead of 1 changes the result"),
        ("[4, 2, 6]", "[4, 6, 2]", "one trial", "ok 2 epochs in"),
        ('/ config["layers"]', "/ 2", "layers", "MEND suggested, but train_model never reads"),
        ('/ config["layers"]', '/ config["layers"] ** 0', "layers", "look train_model reads it, "),
        ("        trial.report(losses[-1], epoch)\n", "", "report", "MEND never called"),
        ("report(losses[-1], epoch)", "report(losses[-1], 0)", "report", "MEND step 0 is reported"),
        ("if trial.should_prune()", "if False", "prune", "MEND should_prune() is never asked"),
        ("raise optuna.TrialPruned", "pass", "prune", "MEND should_prune() said yes and the"),
        ("len(losses), ", "", "resume", "MEND an interrupted trial began again"),
        ("(losses or [1.0])[-1]", "__import__('random').random()", "resume", "MEND interrupted"),
        ("    return losses[-1]", "    return 1 / 0", "one trial", "MEND it failed: ZeroDivision"),
        ("    return losses[-1]", "    return losses[-1], 1.0", "one trial", "MEND it failed: the"),
        ("    return losses[-1]", "    return losses[-1:]", "one trial", "ok 2 epochs in"),
        ("    return losses[-1]", "    return float('nan')", "one trial", "MEND it failed"),
    ],
)  # fmt: skip
def test_one_fault_is_found(check: Checker, old: str, new: str, name: str, finding: str) -> None:
    status, table, _ = check(TOY, (old, new))
    assert table[name].startswith(finding)
    assert status == finding.startswith("MEND")
    assert sum(text.startswith("MEND") for text in table.values()) == status


def test_one_report_at_the_end_cannot_be_pruned(check: Checker) -> None:
    """As of a boosting with fewer rounds than there are between two reports."""
    report = "        trial.report(losses[-1], epoch)\n"
    moved = (report, ""), ("if trial.should_prune()", "if False")
    _, table, _ = check(TOY, *moved, ("    return losses", f"{report[4:]}    return losses"))
    assert table["prune"].startswith("look one report alone")
    assert table["resume"] == "- not tried: see prune"


def test_an_exception_names_its_line(check: Checker) -> None:
    _, table, _ = check(TOY, ("    return losses[-1]", "    return losses[99]"))
    assert re.search(r"IndexError: .* \(script_of_a_user.py, line \d+\)$", table["one trial"])


def test_an_interruption_that_is_swallowed(check: Checker) -> None:
    swallow = "try:\n            if trial.should_prune():\n                raise optuna.TrialPruned"
    swallow += "\n        except BaseException:\n            break"
    old = "if trial.should_prune():\n            raise optuna.TrialPruned"
    status, table, _ = check(TOY, (old, swallow))
    assert status == 1
    assert table["resume"].startswith("MEND an interruption is swallowed")
    assert table["prune"].startswith("MEND")


@pytest.mark.parametrize(
    "read",
    [
        "args = __import__('argparse').Namespace()\n    vars(args).update(config)",
        "args = __import__('types').SimpleNamespace(**config)",
    ],
)
@pytest.mark.parametrize("seconds", [0.01, 10])  # of an epoch
def test_a_value_may_reach_the_model_in_another_way(
    check: Checker, read: str, seconds: float
) -> None:
    given = ("config, trial):\n    losses", f"config, trial):\n    {read}\n    losses")
    reads = [(f'config["{name}"]', f"args.{name}") for name in ("layers", "epochs")]
    reads.append(('* config["lr"]', "* args.lr"))
    body = TOY.replace('"sum": config["lr"] + config["layers"]', '"sum": 0')
    slow = ("        losses.append(", SLOW.format(seconds))
    status, table, _ = check(body, given, *reads, ("train_model", "fit"), slow, BY_THE_CLOCK)
    assert status == 0
    assert table["lr"] == "ok 0.5 instead of 0.1 changes the result"
    assert table["layers"] == "ok 3 instead of 1 changes the result"


def test_a_copy_of_all_values_is_no_use_of_them(check: Checker) -> None:
    given = ("config, trial):\n    losses", "config, trial):\n    args = __import__('types')"
             ".SimpleNamespace(**config)\n    losses")  # fmt: skip
    status, table, _ = check(TOY, given, ('/ config["layers"]', "/ 2"))
    assert status == 1
    assert table["layers"].startswith("MEND suggested, but nothing reads it")


def test_what_there_is_no_time_for_is_not_tried(check: Checker) -> None:
    slow = ("        losses.append(", SLOW.format(60))
    status, table, _ = check(TOY, ("[4, 2, 6]", "[9]"), slow, BY_THE_CLOCK)
    assert status == 0
    assert table["one trial"].startswith("look 4 epochs in")  # and 3 of them after the resume
    assert table["one trial"].endswith("its end takes long: not tried")
    assert table["resume"].startswith("ok interrupted after epoch 1 it went on at epoch 2")
    assert table["lr"] == table["layers"] == "- not tried: no time left"
    assert table["time"].endswith("no time for more")


def test_a_parameter_that_acts_later_is_no_mistake(check: Checker) -> None:
    space = (
        '        "epochs"',
        '        "late": trial.suggest_int("late", 30, 90),\n        "epochs"',
    )
    read = ("losses.append(", "late = 2 if epoch > args.late else 1\n        losses.append(")
    given = ("config, trial):\n    losses", "config, trial):\n    args = __import__('types')"
             ".SimpleNamespace(**config)\n    losses")  # fmt: skip
    status, table, _ = check(TOY, space, given, read)
    assert status == 0
    assert re.match(
        r"look \d+ instead of 30 changes nothing in 2 epochs: is it used", table["late"]
    )


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (
            "epoch, losses[-1] + epoch",
            "is no whole number; trial.report(value, epoch), in this ord",
        ),
        ("losses[-1], 9 - epoch", "step 8 comes after step 9; trial.report(value, epoch): 0, 1, 2"),
    ],
)
def test_steps_that_no_pruner_could_compare_are_a_mistake(
    check: Checker, report: str, says: str
) -> None:
    status, table, _ = check(TOY, ("report(losses[-1], epoch)", f"report({report})"))
    assert status == 1
    assert table["report"].startswith("MEND ")
    assert says in table["report"]


def test_a_value_that_was_never_reported_is_a_remark(check: Checker) -> None:
    """As where the loss is reported, and the accuracy returned: a pruner would stop the best."""
    status, table, _ = check(TOY, ("    return losses[-1]", "    return 1 - losses[-1]"))
    assert status == 0
    assert re.match(r"look the trial ends with \S+, its last report was \S+; ", table["report"])


def test_a_longer_trial_that_fails_at_its_end_is_a_mistake(check: Checker) -> None:
    """The shortest one does not; the others end early, or after their first epoch."""
    status, table, _ = check(TOY, ("    return losses[-1]", "    if len(losses) < 4:\n"
                                   "        return losses[-1]"))  # fmt: skip
    assert status == 1
    assert table["one trial"].startswith("ok ")
    assert table["epochs"].startswith("MEND with epochs=6 the trial fails: the objective returned")


def test_parameters_in_branches_are_tried_there(check: Checker) -> None:
    space = ("    return {**", "    kind = trial.suggest_categorical('kind', ['a', 'b'])\n"
             "    if kind == 'b':\n        config['beta'] = trial.suggest_float('beta', 1, 2)\n"
             "        config['gamma'] = trial.suggest_float('gamma', 1, 2)\n"
             "    return {**")  # fmt: skip
    read = ('/ config["layers"]', '/ config["layers"] * config.get("beta", 3)')
    status, table, _ = check(TOY, space, read)
    assert status == 1
    assert table["kind"].startswith("ok ")
    assert table["beta"].startswith("ok 2 instead of 1.5 changes")
    assert table["gamma"].startswith("MEND suggested, but nothing reads it")


def test_where_nothing_can_be_repeated_nothing_is_proven(check: Checker) -> None:
    chance = ("def search_space", "chance = __import__('random').Random(7)\ndef search_space")
    noise = ('config["lr"] / config["layers"]', 'config["lr"] + chance.uniform(0, 1)')
    status, table, _ = check(TOY, chance, noise)
    assert status == 0
    assert table["layers"].startswith("look not proven")


def test_impossible_combinations_are_passed_by(check: Checker) -> None:
    refuse = ("    return {**", "    if config['layers'] < 3 or config['lr'] < 0.3:\n"
              "        raise optuna.TrialPruned\n    return {**")  # fmt: skip
    status, table, _ = check(TOY, refuse)
    assert status == 0
    for name in ("lr", "layers"):
        assert re.match(r"ok \S+ instead of \S+ changes the result", table[name])


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "    return {**",
            "    trial.suggest_categorical('kind', [dict, list])\n    return {**",
            "choices of",
        ),
        ("    return {**", "    raise KeyError('x')\n    return {**", "search_space fails"),
        ("    return {**", "    raise optuna.TrialPruned\n    return {**", "refuses every"),
    ],
)
def test_a_space_that_cannot_be_used_is_one_line(
    check: Checker, old: str, new: str, line: str
) -> None:
    status, _, printed = check(TOY, (old, new))
    assert status == 2
    assert line in printed.splitlines()[-1]


def test_a_script_without_epochs_says_so(check: Checker) -> None:
    whole = "import optuna\nfrom hpo import run_script, run_worker\nNO_EPOCHS = True\n" \
        "def objective(trial):\n    x = trial.suggest_float('x', -1, 1)\n" \
        "    y = trial.suggest_float('y', -1, 1)\n    return x * x\n" \
        "if __name__ == '__main__':\n    run_script(lambda: run_worker(objective))\n"  # fmt: skip
    status, table, _ = check(whole)
    assert status == 1
    assert list(table) == ["one trial", "x", "y", "time", "memory"]
    assert (table["x"].split()[0], table["y"].split()[0]) == ("ok", "MEND")
    status, table, _ = check(whole, ("NO_EPOCHS = True\n", ""))
    assert table["report"].startswith("MEND never called")


def test_the_table_is_whole_below_the_output_of_the_script(check: Checker) -> None:
    status, table, printed = check(TOY, ("        losses.append", "        print('an epoch')\n"
                                         "        losses.append"))  # fmt: skip
    last = printed[printed.rindex("an epoch") :]
    assert status == 0
    assert rows(last) == table
    assert list(table)[:3] == ["one trial", "prune", "resume"]


def test_a_task_of_slurm_makes_no_difference(check: Checker, own_study: Path) -> None:
    task = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    alone = ("def objective(trial):\n", "def objective(trial):\n    import os\n"
             "    assert 'SLURM_PROCID' not in os.environ\n")  # fmt: skip
    status, table, _ = check(TOY, alone, **task)
    assert status == 0
    assert table["resume"].startswith("ok ")


def test_ctrl_c_ends_it_quietly(tmp_path: Path, own_study: Path) -> None:
    script = tmp_path / "script_of_a_user.py"
    sleep = "        __import__('time').sleep(60)"
    script.write_text(TOY.replace("        losses.append(", f"{sleep}\n        losses.append("))
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS), "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(
        [sys.executable, "-u", str(script), "--check"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert any("interrupted after its first epoch" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert (process.returncode, rest) == (130, "interrupted\n")
    assert not list((tmp_path / "tmp").iterdir())
    assert not own_study.exists()


def test_an_interruption_where_python_ignores_it_comes_again() -> None:
    class Victim:
        pass

    def trial() -> None:
        victim = Victim()
        _ref = weakref.ref(victim, lambda _: time.sleep(60))
        del victim  # what is raised in this sleep leaves it, and no more
        time.sleep(60)

    outcome = short_trial.Outcome()
    with pytest.raises(Drained), short_trial._time_limit(0.2, outcome):
        trial()
    assert outcome.late


def test_a_trial_on_two_gpus(run: Run, tiny_pairs: Path) -> None:
    script = str(SCRIPTS / "optuna_t5.py")
    fixed = "num_layers=1,num_heads=2,lr=0.005,dropout=0,warmup=0.1"  # each would be trials more
    of_two = {"GPUS_PER_TRIAL": "2", "OMP_NUM_THREADS": "1", "FIX": fixed}
    result = run(PATIENT, script, "--check", PYTHONPATH=str(SCRIPTS), **of_two)
    print(result.stdout, result.stderr)
    table = rows(result.stdout)
    assert result.returncode == 0
    assert table["one trial"].startswith("ok 5 epochs in")
    assert table["resume"].startswith("ok interrupted after epoch 1 it went on at epoch 2")
    assert table["d_model"] == "ok 96 instead of 64 changes the result"
    assert "2 processes and the worker" in table["memory"]


def test_an_unknown_argument_is_refused(run: Run, own_study: Path) -> None:
    result = run("optuna_mnist.py", "--chek")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "--chek" in result.stderr
    assert not own_study.exists()
