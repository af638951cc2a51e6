"""The user's script: any callable as objective, its arguments, its encoding, what it declares."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import TrialState

from common import SCRIPTS
from hpo import packages, script
from hpo.settings import Settings
from hpo.study.opening import open_study

HEAD = "import optuna\nfrom hpo import Settings, run_script, run_worker\n"
SPACE = 'def search_space(trial):\n    return {"x": trial.suggest_float("x", -1, 1)}\n'
PLAIN = SPACE + "def objective(trial):\n    return search_space(trial)['x'] ** 2\n"
END = '\nif __name__ == "__main__":\n    run_script(lambda: run_worker(objective))\n'


def run(path: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script, or another command, as a user does who stands beside it."""
    return subprocess.run(
        [sys.executable, str(path), *words],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": "2", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


OBJECTIVES = {
    "partial": SPACE + "import functools\n"
    "def full(trial, data): return search_space(trial)['x'] ** 2 + data\n"
    "objective = functools.partial(functools.partial(full), data=1)\n",
    "instance": SPACE + "class Goal:\n"
    "    def __call__(self, trial): return search_space(trial)['x'] ** 2\nobjective = Goal()\n",
    "method": SPACE + "class Goal:\n"
    "    def run(self, trial): return search_space(trial)['x'] ** 2\nobjective = Goal().run\n",
    "lambda": SPACE + "objective = lambda trial: search_space(trial)['x'] ** 2\n",
    "decorated": SPACE + "from tracking import track\n@track\n"
    "def objective(trial): return search_space(trial)['x'] ** 2\n",
    "decorated without wraps": SPACE + "from tracking import hide\n@hide\n"
    "def objective(trial): return search_space(trial)['x'] ** 2\n",
    "imported": "from mine.goal import objective\n",
    "builtin": "objective = float\n",
}


NO_OBJECTIVES = {
    "objective = None": "None is no function",
    "def objective(): return 1.0": "the objective takes one argument, as in def objective(trial)",
    "def objective(trial, data): return 1.0": "here, missing a required argument: 'data'",
    "async def objective(trial): return 1.0": "the objective is async",
    "def objective(trial): yield 1.0": "the objective has a yield",
    "class Goal:\n    async def __call__(self, trial): return 1.0\nobjective = Goal()": "is async",
    "import functools\nasync def f(data, trial): return 1.0\n"
    "objective = functools.partial(f, 1)": "is async",
}


@pytest.mark.parametrize("text", NO_OBJECTIVES)
def test_what_can_be_no_objective_is_refused(text: str, own_study: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HEAD + text + END)
    result = run(tmp_path / "mine.py")
    assert result.returncode == 2
    assert NO_OBJECTIVES[text] in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not own_study.exists()


X = "def objective(trial): return trial.suggest_float('x', -1, 1) ** 2\n"
NO_SCRIPTS = {
    X + "search_space = {'x': 1}": "search_space: {'x': 1} is no function",
    X + "def search_space(trial): yield 1": "search_space has a yield",
    X + "prepare = True": "prepare: True is no function",
    X + "test_model = 0.5": "test_model: 0.5 is no function",
    X + "def prepare(): open('/no/data.csv')": "prepare() fails: FileNotFoundError: [Errno 2] No "
    "such file or directory: '/no/data.csv' (mine.py, line 5)",
    X + "import sys\ndef prepare(): sys.exit('first: get.py')": "SystemExit: first: get.py",
}


@pytest.mark.parametrize("text", NO_SCRIPTS)
def test_a_name_of_the_contract_is_what_it_says(text: str, own_study: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HEAD + "\n" + text + END)
    result = run(tmp_path / "mine.py")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert NO_SCRIPTS[text] in result.stderr
    assert not own_study.exists()


SILENCE = {
    "disable": "import logging\nlogging.disable(logging.CRITICAL)\n",
    "dictConfig": "import logging.config\nlogging.config.dictConfig({'version': 1})\n",
    "a class of its own": "import logging\nclass Silent(logging.Logger):\n"
    "    def handle(self, record): pass\nlogging.setLoggerClass(Silent)\n",
}


@pytest.mark.parametrize("how", SILENCE)
@pytest.mark.parametrize("where", ["above", "in the objective"])
def test_a_script_that_sets_up_logging_leaves_the_worker_its_lines(
    how: str, where: str, tmp_path: Path
) -> None:
    text = SILENCE[how] + HEAD + PLAIN + END
    if where != "above":
        inside = "def objective(trial):\n" + SILENCE[how].replace("\n", "\n    ").rstrip(" ")
        inside = inside.replace("objective(trial):\n", "objective(trial):\n    ")
        text = HEAD + PLAIN.replace("def objective(trial):\n", inside) + END
    (tmp_path / "mine.py").write_text(text)
    result = run(tmp_path / "mine.py")
    assert result.returncode == 0
    assert "trial 1 complete" in result.stdout
    assert "the study has its 2 trials" in result.stdout


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_any_callable_is_an_objective(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tracking.py").write_text(
        "import functools\n"
        "def track(f):\n    @functools.wraps(f)\n    def inner(trial): return f(trial)\n"
        "    return inner\n"
        "def hide(f):\n    return lambda trial: f(trial)\n"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "goal.py").write_text(PLAIN)
    path = tmp_path / "my.py"
    path.write_text(HEAD + OBJECTIVES[kind] + END)
    done = run(path)
    if kind == "builtin":
        assert "float() argument must be" in done.stdout  # a FAIL like any other
        return
    assert done.returncode == 0, done.stdout + done.stderr
    study = open_study(Settings.from_env())
    assert study.user_attrs["py_script"] == os.path.relpath(path, SCRIPTS)
    assert list(study.user_attrs["space"]) == ["x"]


def test_a_script_in_a_subfolder_with_helpers_beside_it(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "helper.py").write_text(PLAIN)
    path = tmp_path / "models" / "my-model 2.py"
    path.write_text(HEAD + "from helper import objective, search_space\n" + END)
    assert run(path).returncode == 0
    loaded = script.load(os.path.relpath(path, SCRIPTS))
    assert loaded.offers("search_space")


def test_arguments_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    parser = (
        "import argparse\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--shift', type=float, default=0)\nARGS = parser.parse_args()\n"
        "print('shift', ARGS.shift)\n"
    )
    path.write_text(HEAD + parser + PLAIN + END)
    assert "shift 0" in run(path).stdout
    assert "shift 2.5" in run(path, "--", "--shift", "2.5").stdout
    assert "shift 3.5" in run(path, SCRIPT_ARGS="--shift 3.5").stdout
    assert open_study(Settings.from_env()).user_attrs["script_args"] == ["--shift", "3.5"]
    checked = run(path, "--check", "--", "--shift", "4.5").stdout
    assert "shift 4.5" in checked
    wrong = run(path, "--shift", "2.5")
    assert wrong.returncode == 2
    assert "what follows -- is the script's own" in wrong.stderr


@pytest.mark.parametrize("launcher", ["ipykernel_launcher.py", "colab_kernel_launcher.py"])
def test_a_notebook(launcher: str, tmp_path: Path) -> None:
    """Its arguments are the kernel's; and its later cells can be interrupted, as before."""
    cell = f"""{HEAD}{PLAIN}
import signal, threading
handlers = [signal.getsignal(number) for number in range(1, 16)]
print('status', run_worker(objective), handlers == list(map(signal.getsignal, range(1, 16))))
def elsewhere():
    try:
        run_worker(objective)
    except Exception as error:
        print(f'{{type(error).__name__}}: {{error}}')
threading.Thread(target=elsewhere).start()
"""
    path = tmp_path / "kernel.py"
    path.write_text(
        f"import sys\nsys.argv = ['/x/{launcher}', '-f', 'kernel-1.json']\n"
        f"exec(compile({cell!r}, '/tmp/ipykernel_1/123.py', 'exec'), {{'__name__': '__main__'}})\n"
    )
    printed = run(path).stdout
    assert "status 0 True" in printed
    assert "UserError: run_worker is for the main thread" in printed
    assert open_study(Settings.from_env()).user_attrs["py_script"] == script.NOTEBOOK


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"def objective(trial:\n", "line 1: "),
        (HEAD.encode() + b"def objective(trial): return 1.0\n", "never calls run_worker"),
        (b"x = '\xe9'\n", "my.py"),  # no UTF-8, and no word of another encoding
        (HEAD.encode() + b"NEEDS = (1, 2)\nrun_worker\n", "NEEDS must be words"),
        (HEAD.encode() + b"NEEDS = 'no such==thing!'\nrun_worker\n", "no requirement of pip's"),
        (HEAD.encode() + b"NEEDS = 'numpy>=99'\nrun_worker\n", "needs numpy>=99, which"),
    ],
)
def test_what_would_run_nothing_is_found_before_there_is_a_study(
    content: bytes | None, says: str, tmp_path: Path, own_study: Path
) -> None:
    path = tmp_path / "my.py"
    if content is not None:
        path.write_bytes(content)
    done = run(SCRIPTS / "init_optuna_db.py", PY_SCRIPT=str(path))
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not own_study.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + (HEAD + PLAIN + END).encode(),
        "# -*- coding: latin-1 -*-\n# \u00e9t\u00e9\n".encode("latin-1")
        + (HEAD + PLAIN + END).encode(),
    ],
    ids=["byte-order mark", "Latin-1"],
)
def test_it_is_read_with_its_own_encoding(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_bytes(content)
    assert run(path).returncode == 0


def test_what_it_declares(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(
        HEAD + 'OBJECTIVES: tuple[str, ...] = ("a", "b")\nNEEDS = "numpy"\nplain: int\n'
        "from os import path as prepare\n"
    )
    name = os.path.relpath(path, SCRIPTS)
    assert script.declared(name, "OBJECTIVES") == ("a", "b")
    assert script.declared(name, "NEEDS") == ("numpy",)
    assert script.declared(name, "plain") == ()
    assert script.defines(name, "prepare")
    assert not script.defines(name, "path")


def test_requirements_as_pip_knows_them() -> None:
    assert (
        packages.missing(["pyyaml", "numpy>=1.20", "optuna", "PyYAML", "x; python_version<'3'"])
        == []
    )
    assert packages.missing(["numpy<1"]) == ["numpy<1"]
    assert packages.pip_command("optuna", "numpy<1").endswith(
        " pip install optuna==5.0.0 'numpy<1'"
    )


FAULTS = """
    kind = trial.number % 10
    if kind == 1: sys.exit(3)
    if kind == 2: raise KeyboardInterrupt
    if kind == 3: return None
    if kind == 4: return float("nan")
    if kind == 5: raise ValueError(f"layer {trial.number}")
    if kind == 6: raise MemoryError
    if trial.number % 20 == 7: os._exit(0)
    if trial.number % 20 == 17: os.kill(os.getpid(), signal.SIGKILL)
    if kind == 8: assert x > 99
    if kind == 9: raise type("Own", (BaseException,), {})
    time.sleep(0.01)
    return x * x
"""


def test_a_storm_of_faults_costs_the_bad_trials_alone(tmp_path: Path) -> None:
    """Sixty trials, three workers, one of each fault: no worker is lost, no good trial fails."""
    path = tmp_path / "my.py"
    body = "def objective(trial):\n    x = search_space(trial)['x']\n" + FAULTS
    path.write_text(HEAD + "import os, signal, sys, time\n" + SPACE + body + END)
    workers = [
        subprocess.Popen(
            ["bash", "hpo/job/keep_running.sh", str(path), sys.executable, "-u"],
            cwd=SCRIPTS,
            env={
                **os.environ,
                **{"PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": "60", "WORKER_RANK": str(rank)},
                **{"MAX_ATTEMPTS": "1", "LEASE_GRACE": "600"},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    logs = [worker.communicate(timeout=600)[0] for worker in workers]
    found = open_study(Settings.from_env()).get_trials()
    assert [trial.number for trial in found] == list(range(60))
    for trial in found:
        good = trial.number % 10 == 0
        assert trial.state == (TrialState.COMPLETE if good else TrialState.FAIL), logs
        assert good or trial.user_attrs["fail_reason"]
    reasons = Counter(t.user_attrs["fail_reason"].split()[0] for t in found if t.number % 10)
    assert reasons["crashed"] == 6
    assert len(reasons) >= 7
    # Most trials failed, and the workers say so; none was given up.
    assert [worker.returncode for worker in workers] == [1] * 3, logs
    assert all("most of its trials failed: 54 of 60" in log for log in logs)
