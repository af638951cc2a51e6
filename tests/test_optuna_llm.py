"""The fine-tuning of a language model: its data, its loss, and a study from start to export."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

import init_optuna_db
import optuna_llm
from common import SCRIPTS
from hpo import checkpoint, ddp
from hpo.drain import Drain, Drained
from hpo.settings import Settings, UserError, forget
from hpo.show.export import export
from hpo.study.opening import create_or_open_study
from hpo.train import base_model, causal, texts
from hpo.trial import _call, run_trial

PARAMS = {"rank": 4, "alpha": 16, "lr": 0.01, "warmup": 0.1, "dropout": 0.05, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny model, made as SMALL=1 makes it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    base_model._make_tiny(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    return folder


@pytest.fixture
def data(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the test's optuna_llm.py have 200 texts of its own; return their file."""
    path = tmp_path / "texts.jsonl"
    rows = ({"prompt": f"{n} = ", "answer": f"{n:b}", "who": "me"} for n in range(200))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"MODEL": tiny_folder, "DATA": path, "SMALL": 1, "PY_SCRIPT": "optuna_llm.py"}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    return path


# ---------- The study ----------


def test_study_from_start_to_export(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole trial; the same one interrupted at each evaluation; what is kept, and exported."""
    optuna_llm.prepare()
    study, drain = create_or_open_study(Settings.from_env()), Drain(math.inf)
    for _ in range(2):
        study.enqueue_trial(PARAMS)
    run_trial(study, study.ask(), optuna_llm.objective, drain)
    whole = study.get_trials()[0]
    assert whole.state == TrialState.COMPLETE, whole.user_attrs
    curve = whole.intermediate_values
    assert list(curve) == [0, 1, 2, 3]
    assert whole.value == min(curve.values()) < curve[0]  # it does learn

    other = study.ask()
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "number", 0)  # its seed
        patch.setattr(checkpoint, "folder", lambda trial: tmp_path)
        for seed in range(4):
            torch.manual_seed(seed)
            patch.setattr(optuna.Trial, "should_prune", drained)
            with pytest.raises(Drained):
                optuna_llm.objective(other)
            assert list(study.get_trials()[1].intermediate_values) == list(range(seed + 1))
        patch.undo()
        patch.setattr(optuna.Trial, "number", 0)
        patch.setattr(checkpoint, "folder", lambda trial: tmp_path)
        assert optuna_llm.objective(other) == whole.value
    assert study.get_trials()[1].intermediate_values == curve

    weights = torch.load(checkpoint.weights_path(Settings.from_env(), 0), weights_only=True)
    assert {tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name} == {4}
    assert (
        sum(tensor.numel() for tensor in weights.values()) < 50_000
    )  # not the model's 0.2 million
    said = export(study, Settings.from_env(), whole, tmp_path / "best")
    assert said.endswith("parameters")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best" / "adapter")
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    scores = json.loads((tmp_path / "best" / "metrics.json").read_text())
    assert loss_of(loaded, optuna_llm.part("test", config)) == pytest.approx(
        scores["test loss"], abs=1e-4
    )
    assert scores["perplexity"] == pytest.approx(math.exp(scores["test loss"]))


def drained(trial: optuna.Trial) -> bool:
    """Stand for should_prune() of a worker that drains."""
    raise Drained


def loss_of(model: Any, examples: list[causal.Example]) -> float:
    """Return the loss per token, one example after another, by the model's own arithmetic."""
    total = number = 0.0
    for example in examples:
        row = {name: torch.tensor([values]) for name, values in example.items()}
        targets = sum(label != causal.IGNORED for label in example["labels"])
        with torch.no_grad():
            total += model.eval()(**row).loss.item() * targets
        number += targets
    return total / number


def test_two_processes_get_what_one_gets(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUS_PER_TRIAL=2, on the CPU with gloo; without dropout, which differs.

    Until the end of the first epoch, whose last batch is no whole one, and then divided otherwise.
    """
    study = create_or_open_study(Settings.from_env())
    values = []
    for number in ("2", "1"):
        monkeypatch.setenv("GPUS_PER_TRIAL", number)
        forget()
        study.enqueue_trial({**PARAMS, "dropout": 0.0})
        trial = study.ask()
        config = {**optuna_llm.search_space(trial), "evaluations": 2}
        with monkeypatch.context() as patch:
            patch.setattr(optuna.Trial, "number", 0)
            values.append(ddp.together(optuna_llm.train_model, config, trial))
        [path] = checkpoint.folder(trial).parent.glob("trial-00000")
        checkpoint.discard(0)
        assert not path.exists()
    curves = [list(trial.intermediate_values.values()) for trial in study.get_trials()]
    assert curves[0][0] == pytest.approx(curves[1][0], abs=1e-4)
    assert curves[0][1] == pytest.approx(curves[1][1], abs=0.05)
    assert values == [min(curve) for curve in curves]


def test_out_of_memory_says_what_to_lower() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch calls its own."""

    study = optuna.create_study()
    config = {"micro_batch": 4, "length": 1024}
    for error, reason in (
        (OutOfMemoryError("CUDA out of memory"), "lower one of micro_batch=4, length=1024: CUDA"),
        (RuntimeError("can't allocate memory"), "lower one of micro_batch=4"),
    ):

        def objective(trial: optuna.Trial, error: Exception = error) -> float:
            with causal.says_what_to_lower(config, "micro_batch", "length"):
                raise error

        outcome = _call(objective, study.ask(), Drain(math.inf))
        assert outcome.state == TrialState.FAIL
        assert outcome.reason.startswith("out of memory (")
        assert reason in outcome.reason
    with pytest.raises(RuntimeError, match="shapes"), causal.says_what_to_lower(config):
        raise RuntimeError("shapes")


# ---------- What is learnt ----------


def test_prompt_is_no_target_and_every_answer_ends(data: Path, tiny_folder: Path) -> None:
    tokenizer = base_model.tokenizer_of(tiny_folder)
    given, written = optuna_llm.tokens({"prompt": "né 7 = ", "answer": "111"}, tokenizer)
    assert tokenizer.decode(given) == "né 7 = "
    assert tokenizer.decode(written) == "111<end>"
    [example] = causal.cut({"prompt": ""}, given, written, 96)
    assert example["labels"] == [causal.IGNORED] * len(given) + written
    tokenizer.chat_template = "<{{ messages[0].content }}>{{ add_generation_prompt }}"
    given, _ = optuna_llm.tokens({"prompt": "7", "answer": "111"}, tokenizer)
    assert tokenizer.decode(given) == "<7>True"


def test_long_rows_are_cut() -> None:
    given, written = list(range(100)), list(range(100, 130))
    [example] = causal.cut({"prompt": "", "answer": ""}, given, written, 80)
    assert example["input_ids"] == [*range(50, 100), *written]
    [example] = causal.cut({"prompt": "", "answer": ""}, given, written, 20)
    assert example["input_ids"] == [*range(90, 100), *range(100, 110)]
    pieces = causal.cut({"text": ""}, [1], written, 11)
    assert [piece["input_ids"] for piece in pieces] == [
        [1, *written[at : at + 10]] for at in (0, 10, 20)
    ]


def test_loss_is_the_mean_over_all_targets() -> None:
    """Of two examples with one and with three targets: not the mean of their means."""
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, -100, -100, 3], [-100, -100, 1, 2, 3]])
    sums = causal.token_losses((logits,), labels)
    assert sums[:, 1].tolist() == [1, 3]

    class Prediction:
        predictions = sums.numpy()

    found = causal.loss_per_token(Prediction)["loss_per_token"]
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1)
    )
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_space_without_small(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL", "0")
    trial = optuna.create_study().ask()
    config = optuna_llm.search_space(trial)
    assert set(trial.params) == set(PARAMS)
    assert config == {**config, **trial.params, "model": os.environ["MODEL"]}
    assert config["batch_size"] % config["micro_batch"] == 0


def test_first_rows_of_a_part_stand_for_all(data: Path) -> None:
    parts = texts.load_texts(Settings.from_env())
    rows = [row["prompt"] for part in parts for row in part]
    assert len(rows) == len(set(rows)) == 200
    numbers = [int(row["prompt"].split()[0]) for row in parts.training]
    assert 60 < sum(numbers[:50]) / 50 < 140  # in the file they are in their order


# ---------- Bad input ----------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a"}\nplain\n', "line 2: not JSON (Expecting value"),
        (b'{"text": "a"}\n\n["a"]\n', "line 3: is no object with names; give"),
        (b'{"body": "a"}\n', 'line 1: has body; give "text", or "prompt" and "answer"'),
        (b'{"prompt": "a"}\n', 'line 1: has prompt; give "text", or "prompt" and "answer"'),
        (b'{"prompt": "a", "answer": 3}\n', 'line 1: "answer" is no text, or an empty one'),
        (b'{"text": " "}\n', 'line 1: "text" is no text, or an empty one'),
        (b'{"text": "\xe9"}\n', "line 1: not UTF-8"),
        (b"\n", 'is empty; give {"text": …} on each line'),
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', "has too few texts (2)"),
    ],
)
def test_bad_file_is_one_line(content: bytes, says: str, data: Path) -> None:
    data.write_bytes(content)
    with pytest.raises(UserError) as caught:
        texts.load_texts(Settings.from_env())
    assert says in str(caught.value)
    assert str(data) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DATA", "/no/such/file", "DATA: there is no file /no/such/file"),
        ("MODEL", "/no/such/folder", "MODEL: /no/such/folder is no folder"),
        ("MODEL", "{tmp}", "has no config.json: is it a model's folder?"),
        ("MODEL", "{broken}", "cannot be used: "),
        ("MODEL", "", "MODEL is not set: give the folder of a language model"),
    ],
)
def test_bad_model_or_data_makes_no_study(
    name: str,
    value: str,
    says: str,
    data: Path,
    own_study: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = own_study.parent / "broken"
    broken.mkdir()
    for path in tiny_folder.iterdir():
        (broken / path.name).symlink_to(path)
    (broken / "config.json").unlink()
    (broken / "config.json").write_text('{"model_type": "t5"}')
    monkeypatch.setattr(sys, "argv", ["init_optuna_db.py"])
    monkeypatch.setenv("SMALL", "0")
    monkeypatch.setenv(name, value.format(tmp=own_study.parent, broken=broken))
    with pytest.raises(UserError) as caught:
        init_optuna_db.main()
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not own_study.exists()


def test_missing_peft_is_named_with_its_command(data: Path, tmp_path: Path) -> None:
    """A Python that has all packages of this one, but for peft."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(torch.__file__).parent.parent.iterdir():
        if not path.name.startswith("peft"):
            (packages / path.name).symlink_to(path)
    result = subprocess.run(
        [sys.executable, "-S", str(SCRIPTS / "init_optuna_db.py")],
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 2, result.stderr
    assert "optuna_llm.py needs peft, which this Python has not" in result.stderr
    assert result.stderr.endswith("pip install peft==0.21.2\n")
