"""Each name of Optuna that is not public does what the storage expects; others are refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import create_trial

from hpo import packages
from hpo.settings import Settings, UserError
from hpo.study import optuna_private
from hpo.study.opening import create_or_open_study


def test_a_study_knows_its_storage_and_its_id() -> None:
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="one")
    assert optuna_private.storage_of(study) is storage
    assert optuna_private.study_id(study) == storage.get_study_id_from_name("one")


def test_a_trial_knows_its_id() -> None:
    study = optuna.create_study()
    trial = study.ask()
    assert optuna_private.trial_id(trial) == optuna_private.trial_id(study.trials[0])
    frozen = create_trial(value=1.0)
    optuna_private.with_trial_id(frozen, 77)
    assert optuna_private.trial_id(frozen) == 77


def test_a_frozen_study_is_made_as_storages_make_it() -> None:
    made = optuna_private.FrozenStudy(
        "name", None, {"a": 1}, {"b": 2}, 5, directions=[StudyDirection.MAXIMIZE]
    )
    assert (made.study_name, made.user_attrs, made.system_attrs) == ("name", {"a": 1}, {"b": 2})
    assert optuna_private.study_id(made) == 5
    assert made.directions == [StudyDirection.MAXIMIZE]


def test_a_server_answers_a_proxy_that_makes_its_own_calls() -> None:
    calls: list[str] = []

    class Proxy(optuna_private.ProxyOfChannel):
        def open_channel(self) -> grpc.Channel:
            return grpc.insecure_channel(f"{self._host}:{self._port}")

        def call(self, method: Any, request: Any) -> Any:
            calls.append(type(request).__name__)
            return method(request)

    server = grpc.server(ThreadPoolExecutor(1))
    optuna_private.add_storage(server, InMemoryStorage())
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    study = optuna.create_study(storage=Proxy(host="127.0.0.1", port=port))
    study.tell(study.ask(), 2.0)
    assert (study.best_value, len(study.trials)) == (2.0, 1)
    assert {"CreateNewStudyRequest", "CreateNewTrialRequest", "GetTrialsRequest"} <= set(calls)
    assert server.stop(grace=0).wait(10)


def test_another_optuna_is_refused_before_a_trial(
    own_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: "5.1.0")
    with pytest.raises(UserError, match=r"Optuna 5\.1\.0: this bundle was tested with 5"):
        create_or_open_study(Settings.from_env())
    assert not own_study.exists()


def test_the_optuna_that_is_installed_here_is_the_tested_one() -> None:
    """So begins a job, too: python -m hpo.job.begin."""
    assert packages.version_of("optuna") == optuna.__version__
    packages.check_optuna()
