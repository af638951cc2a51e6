"""Optuna's own conformance suite for storages, unmodified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.testing.pytest_storages import StorageTestCase

from hpo.study.storage import SQLiteStorage


class TestSQLiteStorage(StorageTestCase):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[SQLiteStorage]:
        storage = SQLiteStorage(tmp_path / "study.db")
        yield storage
        storage.remove_session()
