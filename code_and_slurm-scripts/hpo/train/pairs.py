"""Pairs of texts, input → output: French numbers, or a user's own file (DATA=pairs.tsv).

    a script's prepare() prepare(settings)        writes the numbers once, checks DATA
    a worker             load_pairs(settings)     training, validation and test pairs

Without DATA the pairs are numbers spelt out in French (1984 → mille neuf cent quatre-vingt-quatre):
0 … 9 999 with SMALL=1, otherwise 0 … 99 999.  A user's file is UTF-8 and has one pair per line,
input<TAB>output.

A pair's part is drawn from a hash of its input: about 80 % are for training, 10 % for validation
and 10 % for the final test, the same on every machine and whatever else is in the file, and an
input that occurs twice is never in two parts.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from hpo.files import whole
from hpo.settings import SCRIPTS, Settings, UserError
from hpo.train.french import in_french

MOST_BYTES = 1024  # of one text: attention's memory grows with the square of it
FOLDER = SCRIPTS.parent / "data"

T = TypeVar("T")
Pair: TypeAlias = "tuple[bytes, bytes]"  # input and output, UTF-8


class Pairs(NamedTuple):
    """The three parts of the data."""

    training: list[Pair]
    validation: list[Pair]
    test: list[Pair]  # for the final score alone


def prepare(settings: Settings) -> Path:
    """Return the file with the pairs; writes that of the French numbers where it is missing.

    Raises:
        UserError: a line of the file is no pair, or there are too few.
    """
    if settings.data:
        path = settings.data
    else:
        count = 10_000 if settings.small else 100_000
        path = FOLDER / f"french-numbers-{count}.tsv"
        if not path.exists():
            _write_numbers(count, path)
    _split(path)
    return path


def load_pairs(settings: Settings) -> Pairs:
    """Return the pairs of DATA, or the French numbers; read once per process.

    Raises:
        UserError: as `prepare`.
    """
    return _split(prepare(settings))


@cache
def _split(path: Path) -> Pairs:
    return Pairs(*divided(read_tsv(path), lambda pair: pair[0], f"{path} has too few pairs"))


def divided(
    items: Iterable[T], key: Callable[[T], bytes], too_few: str
) -> tuple[list[T], list[T], list[T]]:
    """Return the items for training, for validation and for the test, drawn by a hash of `key`.

    Raises:
        UserError: one of the parts is empty; its line begins with `too_few`.
    """
    training: list[T] = []
    validation: list[T] = []
    test: list[T] = []
    for item in items:
        digit = hashlib.blake2b(key(item)).digest()[0] % 10
        part = test if digit == 0 else validation if digit == 1 else training
        part.append(item)
    if not (training and validation and test):
        raise UserError(
            f"{too_few} ({len(training) + len(validation) + len(test)}): 80 % are for training, "
            "10 % for validation, 10 % for the test, and one of these is empty; give 100 or more"
        )
    return training, validation, test


def read_tsv(path: Path) -> list[Pair]:
    """Return the pairs of a file, in its order; empty lines are left out.

    Raises:
        UserError: the file holds no pair, or a line is not input<TAB>output in UTF-8.
    """
    pairs = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        line = line.removesuffix(b"\r")
        if not line:
            continue
        fields = line.split(b"\t")
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8; iconv converts a file") from None
        if len(fields) != 2 or not all(fields):
            raise UserError(f"{path}, line {number}: not input<TAB>output: {text[:60]!r}")
        if max(map(len, fields)) > MOST_BYTES:
            raise UserError(f"{path}, line {number}: a text is longer than {MOST_BYTES} bytes")
        pairs.append((fields[0], fields[1]))
    if not pairs:
        raise UserError(f"{path} is empty; give one pair per line: input<TAB>output")
    return pairs


def _write_numbers(count: int, path: Path) -> None:
    """Write the numbers whole or not at all: other workers may do the same just now."""
    print(f"Spelling out {count} numbers in French, once …", flush=True)
    try:
        with whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{n}\t{in_french(n)}\n" for n in range(count))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
