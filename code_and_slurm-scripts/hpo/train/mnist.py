"""MNIST from data/MNIST/raw: checked, unpacked once, and then resident on the worker's device.

    a script's prepare() prepare()            the four files, unpacked and checked by md5
    a worker             load_training(...)   images and labels on its GPU, loaded once
    check_best_model.py  load_test(...)       the 10 000 test images, which nothing else touches

Nothing here imports torch before a function needs it: init_optuna_db.py starts at once.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpo.files import whole
from hpo.settings import SCRIPTS, TRAIN_IMAGES, UserError

if TYPE_CHECKING:
    import torch

DATA = SCRIPTS.parent / "data"  # the root that torchvision.datasets.MNIST expects
# md5 of the unpacked files, as published with the data set.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Images(NamedTuple):
    """Images and their classes on one device."""

    images: torch.Tensor  # uint8, (n, 1, 28, 28)
    labels: torch.Tensor  # int64, (n,), 0 … 9


def prepare(root: Path = DATA) -> None:
    """Unpack the four files below root/MNIST/raw, or download them where they are missing.

    Raises:
        UserError: a file is damaged, or missing and cannot be downloaded.
    """
    for name in MD5:
        _read(root, name)


@cache
def load_training(device: torch.device, train_images: int = TRAIN_IMAGES) -> tuple[Images, Images]:
    """Return the training and the validation images of one fixed split, resident on `device`.

    Training takes the first 50 000 of the 60 000 images, validation the other 10 000.  With
    fewer `train_images`, for a quick try, validation shrinks along.  Loaded once per process.
    """
    both = _load(train=True, device=device)
    training = slice(0, train_images)
    validation = slice(TRAIN_IMAGES, TRAIN_IMAGES + train_images // 5)
    return (
        Images(both.images[training], both.labels[training]),
        Images(both.images[validation], both.labels[validation]),
    )


def load_test(device: torch.device) -> Images:
    """Return the 10 000 test images; only the final score of the best model may use them."""
    return _load(train=False, device=device)


def _load(train: bool, device: torch.device) -> Images:
    import torch

    part = "train" if train else "t10k"
    # Read without torchvision, whose import takes longer than torch's own.  The files' headers
    # (IDX: 4 bytes, then 4 for each dimension) need no check: `_read` has compared the md5.
    images = torch.from_numpy(_read(DATA, f"{part}-images-idx3-ubyte"))[16:]
    labels = torch.from_numpy(_read(DATA, f"{part}-labels-idx1-ubyte"))[8:]
    return Images(images.view(-1, 1, 28, 28).to(device), labels.to(device, torch.int64))


def _read(root: Path, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return one unpacked file, (bytes,) uint8; unpack or download it where it is not there."""
    raw = root / "MNIST" / "raw"
    packed, unpacked = raw / f"{name}.gz", raw / name
    if unpacked.exists():
        content = np.fromfile(unpacked, np.uint8)
        if _md5(content.data) == MD5[name]:
            return content
    elif not packed.exists():
        _download(root)  # all four files
    _unpack(packed, unpacked, MD5[name])
    return np.fromfile(unpacked, np.uint8)


def _download(root: Path) -> None:
    files = "\n  ".join(f"{name}.gz" for name in MD5)
    try:
        from torchvision.datasets import MNIST

        print(f"MNIST is not complete in {root / 'MNIST' / 'raw'}: downloading it …", flush=True)
        MNIST(root, download=True)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"MNIST is missing and could not be downloaded ({error}); "
            f"put these four files into {root / 'MNIST' / 'raw'}:\n  {files}"
        ) from error


def _unpack(packed: Path, unpacked: Path, expected: str) -> None:
    """Write the unpacked file whole or not at all: other workers may do the same just now."""
    try:
        content = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(packed, unpacked, str(error)) from error
    if _md5(content) != expected:
        raise _damaged(packed, unpacked, f"md5 {_md5(content)} instead of {expected}")
    try:
        with whole(unpacked) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"{unpacked} cannot be written: {error.strerror}") from error


def _damaged(packed: Path, unpacked: Path, why: str) -> UserError:
    damaged = packed if packed.exists() else unpacked
    return UserError(
        f"{damaged} is damaged ({why}); copy {packed.name} again from the bundle "
        f"(git checkout -- {packed.name}), or delete it to have it downloaded"
    )


def _md5(content: bytes | memoryview) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
