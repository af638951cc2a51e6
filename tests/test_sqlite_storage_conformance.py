"""Optuna's own conformance suite for storages, unmodified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.testing.pytest_storages import StorageTestCase

from hpo.study.optuna_private import study_id
from hpo.study.storage import StudyStorage
from storage_helpers import place_of


class TestStorage(StorageTestCase):
    @pytest.fixture
    def storage(self, path: Path) -> Iterator[StudyStorage]:
        storage = StudyStorage(place_of(path, {}))
        for study in storage.get_all_studies():
            storage.delete_study(study_id(study))
        yield storage
        storage.remove_session()
