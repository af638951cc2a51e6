"""The T5 objective: its data, its space, training, resume, and a study from start to export."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

import optuna_t5
from common import TINY_T5, Run
from hpo import words
from hpo.saving import trial_files
from hpo.settings import SCRIPTS, Settings, UserError
from hpo.study.opening import create_or_open_study
from hpo.train import pairs, seq2seq
from hpo.train.french import in_french

pytestmark = pytest.mark.usefixtures("tiny_pairs")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> optuna.Study:
    """Return the test's study of optuna_t5.py."""
    monkeypatch.setenv("PY_SCRIPT", "optuna_t5.py")
    return create_or_open_study(Settings.from_env())


def test_search_space_is_the_guides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMALL")
    trial = optuna.create_study().ask()
    config = optuna_t5.search_space(trial)
    assert trial.distributions == {
        "d_model": CategoricalDistribution([512, 768, 1024]),
        "num_layers": IntDistribution(4, 24),
        "num_heads": CategoricalDistribution([8, 12, 16]),
        "lr": FloatDistribution(1e-6, 1e-4, log=True),
        "dropout": FloatDistribution(0.0, 0.2, step=0.05),
        "warmup": FloatDistribution(0.02, 0.2),
    }
    assert config == {**config, **trial.params, "d_kv": 64, "batch_size": 256}
    assert config["batch_size"] % config["micro_batch"] == 0


@pytest.mark.parametrize("d_model", [512, 768, 1024])
def test_the_largest_nets_fit_80_gb(d_model: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients, Adam's two moments, and what backward needs, counted in float32.

    A GPU keeps the last in bf16, which is half of it.
    """
    monkeypatch.delenv("SMALL")
    study = optuna.create_study()
    study.enqueue_trial({"d_model": d_model, "num_layers": 24, "num_heads": 16})
    config = optuna_t5.search_space(study.ask())
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        torch.device("meta"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        net = optuna_t5.build_model(config)
        digits = torch.zeros(config["micro_batch"], 5 + 1, dtype=torch.long)
        words = torch.zeros(config["micro_batch"], 61 + 1, dtype=torch.long)  # 99 499, the longest
        net(input_ids=digits, labels=words)
    weights = 4 * sum(parameter.numel() for parameter in net.parameters())
    print(f"d_model={d_model}: {(4 * weights + sum(kept.values())) / 1e9:.1f} GB")
    assert 4 * weights < 4 * weights + sum(kept.values()) < 64e9


def test_every_value_reaches_the_net() -> None:
    config = {**TINY_T5, "num_layers": 3, "num_heads": 5, "d_kv": 8, "dropout": 0.15}
    net: Any = optuna_t5.build_model(config)
    assert len(net.encoder.block) == len(net.decoder.block) == 3
    attention = net.encoder.block[0].layer[0].SelfAttention
    assert attention.q.weight.shape == (5 * 8, 32)
    assert net.decoder.block[0].layer[2].DenseReluDense.wi.weight.shape == (4 * 32, 32)
    dropouts = {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)}
    assert dropouts == {0.15}


def test_number_of_heads_that_does_not_fit() -> None:
    unfit = {name: TINY_T5[name] for name in TINY_T5 if name != "d_kv"}
    with pytest.raises(UserError, match="num_heads=3 does not divide d_model=32; give d_kv, too"):
        optuna_t5.build_model({**unfit, "num_heads": 3})
    assert optuna_t5.build_model({**unfit, "num_heads": 4}).config.d_kv == 8  # type: ignore[union-attr]


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    config = {**TINY_T5, "lr": 1.0, "warmup": 0.2}
    rates = [optuna_t5.learning_rate(config, step, 50) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    weights = []
    for micro_batch in (32, 5):
        torch.manual_seed(0)
        net = optuna_t5.build_model(TINY_T5)
        # Not Adam: of a gradient's size it shows nothing.
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        training = pairs.load_pairs(Settings.from_env()).training
        config = {**TINY_T5, "lr": 0.1, "micro_batch": micro_batch}
        optuna_t5.train_epoch(net, optimizer, training, config, 0, 0)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-5)


def test_training_uses_neither_the_test_pairs_nor_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is fetched from a hub; and what is trained on or judged by is never a test pair."""
    seen: set[pairs.Pair] = set()
    original = seq2seq.summed_loss

    def record(model: torch.nn.Module, batch: list[pairs.Pair]) -> torch.Tensor:
        seen.update(batch)
        return original(model, batch)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(seq2seq, "summed_loss", record)
    monkeypatch.setattr(optuna_t5, "summed_loss", record)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    first, last = (optuna_t5.train_model({**TINY_T5, "epochs": epochs}) for epochs in (1, 6))
    assert last < 0.8 * first
    data = pairs.load_pairs(Settings.from_env())
    assert seen == {*data.training, *data.validation}
    assert not seen & set(data.test)
    assert len(seen) + len(data.test) == 200


def test_resumed_trial_equals_the_uninterrupted_one(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**TINY_T5, "dropout": 0.1}
    trial, other = study.ask(), study.ask()
    whole = optuna_t5.train_model(config, trial)
    curve = study.get_trials()[0].intermediate_values
    trial_files.state_path(trial.number).unlink()

    class Died(BaseException):
        """Stands for the end of the process right after the second epoch's checkpoint."""

    def die(self: optuna.Trial, value: float, step: int) -> None:
        if step == 1:
            raise Died
        original(self, value, step)

    original = optuna.Trial.report
    monkeypatch.setattr(optuna.Trial, "number", trial.number)  # its seed
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "report", die)
        with pytest.raises(Died):
            optuna_t5.train_model(config, other)
    torch.manual_seed(12345)  # whatever else the process does in between
    assert optuna_t5.train_model(config, other) == whole
    assert study.get_trials()[1].intermediate_values == curve


@pytest.mark.parametrize(("capability", "bf16"), [((7, 5), False), ((8, 0), True)])
def test_bf16_where_the_gpu_has_it(
    capability: tuple[int, int], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.is_bf16_supported() says yes to an emulation, too."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: asked.append(options["enabled"]))
    seq2seq.precision(torch.device("cuda"))
    assert asked == [bf16]


def test_tokens_and_text() -> None:
    texts = ["Œuvre № 3".encode(), b"a"]
    rows = seq2seq.tokens(texts, torch.device("cpu"))
    assert rows.shape == (2, len(texts[0]) + 1)
    assert rows.max() < seq2seq.VOCABULARY
    assert [seq2seq.text_of(row) for row in rows.tolist()] == texts
    assert rows[1].tolist()[:3] == [ord("a") + 3, seq2seq.END, seq2seq.PAD]


def test_exact_match_counts_whole_outputs() -> None:
    class Parrot(torch.nn.Module):
        """Writes its input, whatever was asked."""

        device = torch.device("cpu")

        def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            return torch.cat([torch.zeros(len(input_ids), 1, dtype=torch.int64), input_ids], 1)

    pairs = [(b"abc", b"abc"), (b"abc", b"ab"), (b"ab", b"abc"), (b"x", b"x")]
    assert seq2seq.exact_match(Parrot(), pairs) == 0.5


def test_parts_do_not_depend_on_what_else_is_in_the_file(tmp_path: Path) -> None:
    few, many = tmp_path / "few.tsv", tmp_path / "many.tsv"
    few.write_text("".join(f"{n}\tx\n" for n in range(100)))
    many.write_text("".join(f"{n}\tx\n" for n in range(999, -1, -1)))
    some, all_of_them = pairs._split(few), pairs._split(many)
    for part, whole in zip(some, all_of_them, strict=True):
        assert set(part) < set(whole)
    assert [len(part) for part in all_of_them] == pytest.approx([800, 100, 100], abs=40)


def test_numbers_are_those_of_earlier_studies() -> None:
    """The file is that which num2words 0.5.14 spelt, byte by byte: DATA of studies that go on."""
    lines = "".join(f"{n}\t{in_french(n)}\n" for n in range(100_000))
    assert hashlib.sha256(lines.encode()).hexdigest() == (
        "2b0746ae245be5bbc1c2712ad5306d2130c595440e53dd0f47bf4bfa8ed69840"
    )


def test_numbers_are_spelt_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "numbers.tsv"
    pairs._write_numbers(2000, path)
    words = dict(pairs.read_tsv(path))
    assert words[b"1984"] == b"mille neuf cent quatre-vingt-quatre"
    assert len(words) == 2000
    assert path.stat().st_mode & 0o444 == 0o444  # of the group, too

    monkeypatch.delenv("DATA")
    monkeypatch.setattr(pairs, "FOLDER", tmp_path)
    path.rename(tmp_path / "french-numbers-10000.tsv")
    monkeypatch.setattr(pairs, "_write_numbers", lambda *arguments: pytest.fail("again"))
    assert sum(map(len, pairs.load_pairs(Settings.from_env()))) == 2000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"1\tun\n2\n3\ttrois\n", "line 2: not input<TAB>output: '2'"),
        (b"1\tun\n2\tdeux\ttwo\n", r"line 2: not input<TAB>output: '2\tdeux\ttwo'"),
        (b"1\t\n", r"line 1: not input<TAB>output: '1\t'"),
        (b"\n\n1\t\xe9t\xe9\n", "line 3: not UTF-8"),
        (b"1\t" + b"x" * 2000, "line 1: a text is longer than 1024 bytes"),
        (b"", "is empty; give one pair per line"),
        (b"\r\n\n", "is empty; give one pair per line"),
        (b"\xef\xbb\xbf1\tun\r\n2\tdeux\r\n", "has too few pairs (2)"),
        (None, "there is no file"),
    ],
)
def test_bad_file_is_one_line_and_makes_no_trial(
    content: bytes | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.tsv"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("DATA", str(path))
    with pytest.raises(UserError) as caught:
        optuna_t5.prepare()
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "study.db").exists()


def test_bad_file_stops_the_job_before_its_workers(tiny_pairs: Path, run: Run) -> None:
    tiny_pairs.write_text("1\tun\nno tab\n")
    for script in ("init_optuna_db.py", "optuna_t5.py"):
        result = run(script, PY_SCRIPT="optuna_t5.py")
        expected = f"{script}: error: {tiny_pairs}, line 2: not input<TAB>output: 'no tab'\n"
        assert (result.returncode, result.stderr) == (2, expected)


def test_missing_package_is_named_with_its_command(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Python that has all packages of this one, but for transformers."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(torch.__file__).parent.parent.iterdir():
        if not path.name.startswith("transformers"):
            (packages / path.name).symlink_to(path)
    for script in ("init_optuna_db.py", "optuna_t5.py"):
        result = subprocess.run(
            [sys.executable, "-S", str(SCRIPTS / script)],
            env={**os.environ, "PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 2, result.stderr
        assert "optuna_t5.py needs transformers, which" in result.stderr
        command = result.stderr.splitlines()[-1]
        assert command.endswith("pip install transformers==4.57.6")
    assert study.get_trials() == []


def test_study_from_start_to_export(tiny_pairs: Path, run: Run, tmp_path: Path) -> None:
    """Two trials; then everything that check_best_model.py does, without SMALL and DATA."""
    names = {"PY_SCRIPT": "optuna_t5.py", "TOTAL_TRIALS": "2", "SEED": "1", "PRUNER": "none"}
    result = run("optuna_t5.py", **names)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("complete") == 2
    refused = run("optuna_t5.py", **names, SMALL="")
    assert refused.returncode == 2
    assert (
        f"SMALL=1 DATA={os.path.relpath(tiny_pairs, SCRIPTS)} TRAIN_IMAGES=200; give"
        in refused.stderr
    )

    later = {**names, "SMALL": "", "DATA": ""}
    shown = run("check_best_model.py", **later)
    assert shown.returncode == 0, shown.stderr
    assert "2 of 2 trials: 2 complete" in shown.stdout
    assert "\nexact match     0" in shown.stdout
    exported = run("check_best_model.py", "--export", str(tmp_path / "best"), **later)
    assert exported.returncode == 0, exported.stderr
    metrics = json.loads((tmp_path / "best" / "metrics.json").read_text())
    assert f"test loss       {words.shown(metrics['test loss'])}" in shown.stdout
    loaded = subprocess.run(
        [sys.executable, str(tmp_path / "best" / "load_model.py")],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "T5ForConditionalGeneration" in loaded.stdout, loaded.stderr
    retrained = run("check_best_model.py", "--retrain", "2", **later)
    assert "(2 seeds)" in retrained.stdout, retrained.stderr


def test_hopeless_trial_is_pruned(study: optuna.Study, run: Run) -> None:
    for _ in range(6):  # the median pruner starts after five finished trials
        study.add_trial(
            optuna.create_trial(
                params={"lr": 5e-3},
                distributions={"lr": FloatDistribution(1e-3, 1e-2, log=True)},
                value=0.0,
                intermediate_values=dict.fromkeys(range(9), 0.0),
            )
        )
    result = run("optuna_t5.py", TOTAL_TRIALS="7", PRUNER="median")
    assert result.returncode == 0, result.stdout + result.stderr
    pruned = study.get_trials()[6]
    assert pruned.state == TrialState.PRUNED
    assert list(pruned.intermediate_values) == [0]
    assert list(Settings.from_env().checkpoints.iterdir()) == []
