"""The data: unpacked and checked, damaged or missing files named, one fixed split."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

from common import BUNDLE
from hpo.settings import UserError
from hpo.train import mnist

RAW = BUNDLE / "data" / "MNIST" / "raw"
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a copy of the bundle's data folder as a fresh clone has it."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in RAW.glob("*.gz"):
        shutil.copy(packed, raw)
    return tmp_path / "data"


def test_torchvision_reads_what_prepare_unpacks(root: Path) -> None:
    mnist.prepare(root)
    assert len(MNIST(root, train=True)) == 60_000
    assert len(MNIST(root, train=False)) == 10_000


def test_eight_processes_unpack_at_once(root: Path) -> None:
    code = (
        f"from pathlib import Path; from hpo.train import mnist; mnist.prepare(Path({str(root)!r}))"
    )
    folder = BUNDLE / "code_and_slurm-scripts"
    workers = [subprocess.Popen([sys.executable, "-c", code], cwd=folder) for _ in range(8)]
    assert [worker.wait(timeout=600) for worker in workers] == [0] * 8
    names = sorted(path.name for path in (root / "MNIST" / "raw").iterdir())
    assert names == sorted([*mnist.MD5, *(f"{name}.gz" for name in mnist.MD5)])


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "other content"])
def test_damaged_file_is_named_and_left(damage: str, root: Path) -> None:
    packed = root / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    content = {
        "truncated": packed.read_bytes()[:5000],
        "not gzip": b"<html>404</html>",
        "other content": gzip.compress(b"abc"),
    }[damage]
    packed.write_bytes(content)
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz is damaged") as caught:
        mnist.prepare(root)
    assert "git checkout -- train-labels-idx1-ubyte.gz" in str(caught.value)
    assert packed.read_bytes() == content


def test_damaged_unpacked_file_is_made_again(root: Path) -> None:
    mnist.prepare(root)
    unpacked = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    unpacked.write_bytes(unpacked.read_bytes()[:-1])
    mnist.prepare(root)
    assert len(MNIST(root, train=False)) == 10_000


def test_missing_files_without_network(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz").unlink()
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        mnist.prepare(root)
    assert "put these four files into" in str(caught.value)
    assert "t10k-images-idx3-ubyte.gz" in str(caught.value)


def test_the_split_is_fixed_and_disjoint() -> None:
    mnist.prepare()  # torchvision reads no packed files
    training, validation = mnist.load_training(CPU)
    whole = MNIST(BUNDLE / "data", train=True)
    assert training.images.dtype == torch.uint8
    assert training.images.shape == (50_000, 1, 28, 28)
    assert validation.images.shape == (10_000, 1, 28, 28)
    assert torch.equal(torch.cat([training.labels, validation.labels]), whole.targets)
    assert torch.equal(torch.cat([training.images, validation.images])[:, 0], whole.data)


def test_a_worker_loads_the_data_once() -> None:
    first, second = mnist.load_training(CPU), mnist.load_training(CPU)
    assert first[0].images.data_ptr() == second[0].images.data_ptr()
