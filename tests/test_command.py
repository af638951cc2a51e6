"""Any program as an objective: its metric, its end, its failures; optuna_command.py as shipped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

import optuna_command
from common import BUNDLE, LIMIT, SCRIPTS, Run, wait_for
from hpo import checkpoint
from hpo.drain import Drain, Drained
from hpo.loops.command import Command
from hpo.settings import Settings, UserError
from hpo.study.opening import create_or_open_study, open_study
from hpo.train import mnist
from hpo.trial import let_several_objectives_report, run_trial

VALUE = r"value (\S+)"


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study, made as init_optuna_db.py makes it."""
    return create_or_open_study(Settings.from_env())


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., Command]:
    """Return a function that makes a Command of the text of a shell script."""

    def made(text: str, arguments: str = "{x}", **options: Any) -> Command:
        script = tmp_path / "program.sh"
        script.write_text(text)
        where = {} if "results" in options else {"pattern": VALUE}
        return Command(f"sh {script} {arguments}", **{**where, **options})

    return made


def ended(study: optuna.Study, command: Command, **config: Any) -> FrozenTrial:
    """Run one trial with this command, and return how it ended."""
    trial = study.ask()

    def objective(trial: optuna.Trial) -> Any:
        return command.run(trial, config or {"x": trial.suggest_float("x", 0, 1)})

    run_trial(study, trial, objective, Drain(float("inf")))
    return study.get_trials()[trial.number]


def log_of(number: int) -> str:
    """Return what the program of a trial has printed."""
    [path] = (Settings.from_env().beside / "logs").glob(f"*.trial-{number:05d}.out")
    return path.read_text()


# ---------- Programs ----------


def test_shipped_example(run: Run) -> None:
    result = run("optuna_command.py", TOTAL_TRIALS="3", KEEP_BEST="1", PRUNER="none")
    assert result.returncode == 0, result.stdout + result.stderr
    found = open_study(Settings.from_env()).get_trials()
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 3
    for trial in found:
        epochs = trial.params["epochs"]
        assert sorted(trial.intermediate_values) == list(range(1, epochs + 1))
        assert trial.value == trial.intermediate_values[epochs]
        assert f"epoch {epochs}: validation loss {trial.value}\n" in log_of(trial.number)
    best = min(found, key=lambda trial: trial.value or 0)
    kept = [path.name for path in Settings.from_env().checkpoints.iterdir()]
    assert kept == [f"trial-{best.number:05d}"]
    shown = run("check_best_model.py").stdout
    assert shown.endswith(f"folder          {Settings.from_env().checkpoints / kept[0]}\n")


def test_needs_no_torch() -> None:
    code = "import optuna_command, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, timeout=LIMIT).returncode == 0


def test_program_that_resumes_ends_with_the_same_value(study: optuna.Study) -> None:
    config = {"lr": 0.05, "degree": 2, "epochs": 12}
    command = optuna_command.COMMAND.replace("{seed}", "1")
    program = Command(command, pattern=optuna_command.PATTERN)
    whole = ended(study, program, **config)
    trial = study.ask()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "should_prune", stop)
        patch.setattr("hpo.loops.command.POLL_SECONDS", (0.001, 0.001))
        with pytest.raises(Drained):
            program.run(trial, config)
    first = study.get_trials()[1].intermediate_values
    assert 0 < len(first) < 12
    assert program.run(trial, config) == whole.value
    assert study.get_trials()[1].intermediate_values == whole.intermediate_values
    assert log_of(1).count("epoch 1:") <= 2  # at most told again: it did go on
    assert log_of(1).count("epoch ") <= 12 + 1


def stop() -> bool:
    """Stand for should_prune() of a worker that drains."""
    raise Drained


def test_unchanged_pytorch_script(study: optuna.Study) -> None:
    mnist.prepare()  # torchvision takes no image that is still packed
    script = BUNDLE / "tests" / "plain_training" / "train.py"
    command = Command(
        f"python {script} --images 256 --lr {{lr}} --epochs {{epochs}}",
        pattern=r"validation loss (\S+)",
    )
    trial = ended(study, command, lr=1e-3, epochs=2)
    assert trial.state == TrialState.COMPLETE, trial.user_attrs
    assert list(trial.intermediate_values) == [0, 1]
    assert 1 < trial.value < 3  # type: ignore[operator]


C_PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
int main(int count, char **words) {
    double x = atof(words[1]);
    for (int step = 0; step < 3; step++) printf("step %d value %.17g\\n", step, x * x / (step + 1));
    return 0;
}
"""


@pytest.mark.skipif(
    shutil.which("gcc") is None and not os.environ.get("CI"), reason="needs a C compiler"
)
def test_c_program(study: optuna.Study, tmp_path: Path) -> None:
    (tmp_path / "square.c").write_text(C_PROGRAM)
    subprocess.run(["gcc", "-o", "square", "square.c"], cwd=tmp_path, check=True)
    trial = ended(study, Command(f"{tmp_path}/square {{x}}", pattern=VALUE))
    x = trial.params["x"]
    assert trial.intermediate_values == {0: x * x, 1: x * x / 2, 2: x * x / 3}
    assert trial.value == x * x / 3


def test_metric_in_a_progress_bar_and_in_a_last_line_without_end(
    study: optuna.Study, shell: Callable[..., Command]
) -> None:
    program = shell(r"printf 'x 1 value 3\rx 2 value 2\r\nvalue 1'")
    assert ended(study, program).intermediate_values == {0: 3, 1: 2, 2: 1}


def test_value_is_one_word_whatever_is_in_it(
    study: optuna.Study, shell: Callable[..., Command], tmp_path: Path
) -> None:
    program = shell('echo "$# arguments: $1, $2" && echo value 1', "--a={x} '{{x}} {x}'")
    evil = f"$(touch {tmp_path}/evil) '; touch {tmp_path}/evil"
    assert ended(study, program, x=evil).state == TrialState.COMPLETE
    assert f"2 arguments: --a={evil}, {{x}} {evil}\n" in log_of(0)
    assert not (tmp_path / "evil").exists()


def test_placeholders_of_the_trial(
    study: optuna.Study, shell: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    Settings.from_env(SEED="40")
    program = shell('echo "$@" && echo value 1', "{x} {seed} {trial} {gpu} {folder}")
    assert ended(study, program, x=1).state == TrialState.COMPLETE
    ended(study, program, x=0.5)
    folder = checkpoint.folder_path(Settings.from_env(), 1)
    assert f"0.5 41 1 3 {folder}\n" in log_of(1)


def test_steps_are_counted_on_when_the_program_can_go_on(
    study: optuna.Study, shell: Callable[..., Command]
) -> None:
    """Without {folder} it begins again, and repeats itself."""
    for arguments, expected in (
        ("{x} {folder}", {0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0}),
        ("{x}", {0: 5.0, 1: 4.0, 2: 2.0}),
    ):
        trial = study.ask()
        trial.report(5.0, 0)
        trial.report(4.0, 1)
        lines = "value 3; echo value 2" if "folder" in arguments else "value 5; echo value 4"
        more = "" if "folder" in arguments else "; echo value 2"
        assert shell(f"echo {lines}{more}", arguments).run(trial, {"x": 1}) == 2.0
        assert study.get_trials()[trial.number].intermediate_values == expected


def test_program_that_was_at_its_end_keeps_its_last_value(
    study: optuna.Study, shell: Callable[..., Command]
) -> None:
    trial = study.ask()
    trial.report(5.0, 0)
    trial.report(4.0, 1)
    assert shell("exit 0", "{x} {folder}").run(trial, {"x": 1}) == 4.0


# ---------- JSON lines: several objectives, constraints ----------

JSON = """
echo '{"step": 1, "loss": 0.5, "constraints": {"memory": 2.5}}' >> "$2/results.jsonl"
printf '{"ste\\n{"step": 2, "loss": 0.25, "size": 10}\\n' >> "$2/results.jsonl"
echo '{"constraints": {"memory": -0.5}}' >> "$2/results.jsonl"
"""
FILE = "{folder}/results.jsonl"


def test_objectives_and_constraints_in_json(
    shell: Callable[..., Command], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OBJECTIVES", "loss,size")
    study = create_or_open_study(Settings.from_env())
    program = shell(JSON, "{x} {folder}", results=FILE, objectives=("loss", "size"))
    trial = study.ask()
    let_several_objectives_report(trial)
    values = program.run(trial, {"x": 1})
    assert values == (0.25, 10)
    study.tell(trial, values)
    frozen = study.get_trials()[0]
    assert frozen.intermediate_values == {1: 0.5, 2: 0.25}
    assert frozen.constraints == {"memory": -0.5}
    assert "'{\"ste' is no JSON object, and left out" in caplog.text


def test_one_objective_of_several(study: optuna.Study, shell: Callable[..., Command]) -> None:
    program = shell(JSON, "{x} {folder}", results=FILE, objectives=("loss", "size"))
    assert ended(study, program, x=1).values == [0.25]
    wrong = shell(JSON, "{x} {folder}", results=FILE, objectives=("error",))
    assert "exit status 0, but no error in /" in reason(ended(study, wrong, x=1))


# ---------- Ended early ----------

LOOP = "trap 'exit 3' TERM; i=0; while true; do i=$((i + 1)); echo value $i; sleep 0.1; done"


def test_pruned_program_is_ended(
    study: optuna.Study, shell: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    trial = ended(study, shell(LOOP))
    assert trial.state == TrialState.PRUNED
    assert 1 <= len(trial.intermediate_values) < 50
    wait_for(lambda: not processes("program.sh"))


def test_nothing_is_reported_after_the_pruned_step(
    study: optuna.Study, shell: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lines come at once; a program that goes on is told so, too."""
    monkeypatch.setattr(
        optuna.Trial, "should_prune", lambda self: self.storage.get_trial(1).last_step == 1
    )
    program = shell("printf 'value 1\\nvalue 2\\nvalue 3\\n'; sleep 99")
    trial = ended(study, program)
    assert (trial.state, trial.intermediate_values) == (TrialState.PRUNED, {0: 1.0, 1: 2.0})


def processes(word: str) -> list[str]:
    """Return the command lines of the running processes that have this word in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if word in line:
            found.append(line)
    return found


@pytest.mark.parametrize(("deaf", "says"), [("", False), ("trap '' TERM;", True)])
def test_whole_group_is_ended_also_one_that_ignores_sigterm(
    deaf: str,
    says: bool,
    study: optuna.Study,
    shell: Callable[..., Command],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    child = f"{deaf} sleep 4321 & echo value 1; wait; sleep 4321"
    grace = 0.5 if deaf else LIMIT
    assert ended(study, shell(f"{deaf} {child}", grace=grace)).state == TrialState.PRUNED
    wait_for(lambda: not processes("sleep 4321"))
    line = "the program did not end within 0.5 s of SIGTERM, and was ended by SIGKILL"
    assert (line in caplog.text) == says


STUDY = """
from hpo import run_script, run_worker
from hpo.loops.command import Command

program = Command({command!r}, pattern=r"value (\\S+)")

def search_space(trial):
    return {{"x": trial.suggest_float("x", 0, 1)}}

def prepare():
    program.check(search_space)

def objective(trial):
    return program.run(trial, search_space(trial))

if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that writes the script of a study of this command."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv("PY_SCRIPT", str(tmp_path / "my_study.py"))

    def made(command: str) -> Path:
        path = tmp_path / "my_study.py"
        path.write_text(STUDY.format(command=command))
        return path

    return made


WAITS = """
test -e "$2/seen" && echo value 2 && exit 0
trap 'touch "$2/seen"; echo value 1; exit 0' TERM
touch "$2/begun"; sleep 98765 & wait
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_of_the_worker_end_the_program(
    signum: signal.Signals, script: Callable[[str], Path], tmp_path: Path
) -> None:
    """The trial goes back; what the program did in its last moments counts, and it goes on."""
    (tmp_path / "waits.sh").write_text(WAITS)
    path = script(f"sh {tmp_path}/waits.sh {{x}} {{folder}}")
    worker = subprocess.Popen(
        [sys.executable, str(path)],
        env={**os.environ, "TOTAL_TRIALS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begun = Settings.from_env().checkpoints / "trial-00000" / "begun"
    wait_for(begun.exists)
    worker.send_signal(signum)
    output, _ = worker.communicate(timeout=LIMIT)
    wait_for(lambda: not processes("sleep 98765"))
    [trial] = open_study(Settings.from_env()).get_trials()
    if signum == signal.SIGKILL:
        assert trial.state == TrialState.RUNNING
        return
    assert worker.returncode == 0, output
    assert (trial.state, trial.intermediate_values) == (TrialState.WAITING, {0: 1.0})
    again = subprocess.run([sys.executable, str(path)], env={**os.environ, "TOTAL_TRIALS": "1"})
    assert again.returncode == 0
    [trial] = open_study(Settings.from_env()).get_trials()
    assert (trial.value, trial.intermediate_values) == (2.0, {0: 1.0, 1: 2.0})


def test_a_worker_that_is_killed_while_it_begins_a_program_leaves_none(tmp_path: Path) -> None:
    """Its last moment is that before the guard, which would end the program, is there."""
    killed = f"""
import os, subprocess, sys
from pathlib import Path
from hpo.loops.process import running
begin, begun = subprocess.Popen, []
def popen(*arguments, **options):
    if begun:
        os._exit(9)
    begun.append(begin(*arguments, **options))
    return begun[0]
subprocess.Popen = popen
with running(["sleep", "87654"], Path("{tmp_path}/log"), 1.0):
    sys.exit("the guard was there before")
"""
    result = subprocess.run([sys.executable, "-c", killed], cwd=SCRIPTS)
    assert result.returncode == 9
    wait_for(lambda: not processes("sleep 87654"))


# ---------- Failures ----------


def reason(trial: FrozenTrial) -> str:
    """Return why a trial has failed."""
    assert trial.state == TrialState.FAIL
    return str(trial.user_attrs["fail_reason"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("echo value 1; seq 9; exit 3", "exit status 3: 7 | 8 | 9 (/"),
        ("exit 4", "exit status 4: no output (/"),
        ("kill -SEGV $$", "ended by SIGSEGV: no output"),
        ("kill -KILL $$", "out of memory? (ended by SIGKILL: no output)"),
        (
            "echo RuntimeError: CUDA out of memory. Tried; exit 1",
            "out of memory (exit status 1: Ru",
        ),
        ("echo what: std::bad_alloc; echo more; exit 1", "out of memory (exit status 1: what: std"),
        (
            "echo no metric",
            r"exit status 0, but nothing in its output matches pattern='value (\\S+)'",
        ),
        ("echo value high", "metric: the program says 'high', which is no number"),
    ],
)
def test_failure_has_its_reason(
    text: str, says: str, study: optuna.Study, shell: Callable[..., Command]
) -> None:
    assert reason(ended(study, shell(text))).startswith(says)


def test_full_disk_is_not_the_trials_fault(
    study: optuna.Study, shell: Callable[..., Command]
) -> None:
    trial = ended(study, shell("echo 'OSError: [Errno 28] No space left on device'; exit 1"))
    assert trial.state == TrialState.WAITING


def space(trial: Any) -> dict[str, Any]:
    """Return a configuration of two parameters, the second in a branch."""
    return {"x": trial.suggest_float("x", 0, 1), "y": trial.suggest_int("y", 1, 3)}


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("true {x}", {}, r"the command has no {y}, which search_space returns"),
        ("true {x} {y} {z}", {}, r"has {z}, which is no parameter .* itself write {{z}}$"),
        ("true {x} {y}", {"pattern": "loss (.*"}, "is no regular expression: missing \\)"),
        ("true {x} {y}", {"pattern": "loss .*"}, r"has no group \(…\) around the metric"),
        ("true {x} {y}", {"pattern": ""}, "give either pattern=… or results=…"),
        ("true {x} {y}", {"pattern": "", "results": "r.jsonl"}, "trials share it"),
        ("true {x} {y}", {"pattern": "", "results": "{f}"}, "the results has {f}, which is no"),
        ("no-such-program {x} {y}", {}, "program is not found, or cannot be run: no-such-program"),
        ("./no-such {x} {y}", {}, "program is not found, or cannot be run: /.*/no-such"),
        ("python no_such.py {x} {y}", {}, "program is not found: /.*/no_such.py"),
        ("sh 'x {x} {y}", {}, "the command is none: No closing quotation"),
    ],
)
def test_wrong_command_is_one_line_before_a_trial(
    command: str, options: dict[str, Any], says: str
) -> None:
    program = Command(command, **{"pattern": VALUE, **options})
    with pytest.raises(UserError, match=says) as error:
        program.check(space)
    assert "\n" not in str(error.value)


def test_study_is_made_without_a_word_of_optunas(run: Run) -> None:
    result = run("init_optuna_db.py", PY_SCRIPT="optuna_command.py")
    assert (result.returncode, result.stderr) == (0, "")


def test_wrong_command_ends_the_worker(script: Callable[[str], Path], run: Run) -> None:
    result = run(script("no-such-program {x}"))
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "no-such-program" in result.stderr
    assert not (Settings.from_env().sqlite_path or Path()).exists()  # no study was made
