"""Texts for a language model: a user's JSON lines (DATA=texts.jsonl), or French numbers.

    {"text": "Once upon a time …"}                        everything is learnt
    {"prompt": "1984 = ", "answer": "mille neuf cent …"}  the answer alone is learnt

    a script's prepare() load_texts(settings)     checks DATA
    a worker             load_texts(settings)     training, validation and test rows

The file is UTF-8 and has one object per line; other names in it are ignored.  Without DATA the rows
are the numbers of hpo/train/pairs.py, spelt out in French.  A row's part, and its place there, come
from a hash of its prompt, or text.  TRAIN_IMAGES is the number of rows to train on; at its default
all of them.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from hpo.settings import TRAIN_IMAGES, Settings, UserError
from hpo.train import pairs
from hpo.words import one_line

FORMS = ({"text"}, {"prompt", "answer"})

Row: TypeAlias = "dict[str, str]"  # "text", or "prompt" and "answer"


class Texts(NamedTuple):
    """The three parts of the data."""

    training: list[Row]
    validation: list[Row]
    test: list[Row]  # for the final score alone


def load_texts(settings: Settings) -> Texts:
    """Return the rows of DATA, or the French numbers; read once per process.

    Raises:
        UserError: a line of the file is none of the two forms, or there are too few.
    """
    texts = _numbers(pairs.prepare(settings)) if settings.data is None else _split(settings.data)
    if settings.train_images == TRAIN_IMAGES:
        return texts
    return texts._replace(training=texts.training[: settings.train_images])


@cache
def _numbers(path: Path) -> Texts:
    rows = [{"prompt": f"{n.decode()} = ", "answer": w.decode()} for n, w in pairs.read_tsv(path)]
    return _parts(rows, path)


@cache
def _split(path: Path) -> Texts:
    return _parts(read_json_lines(path), path)


def _parts(rows: list[Row], path: Path) -> Texts:
    """Divide the rows; in an order of chance, so that the first ones of a part stand for all."""

    def key(row: Row) -> bytes:  # the prompt, or else the text
        return next(iter(row.values())).encode()

    mixed = sorted(rows, key=lambda row: hashlib.blake2b(key(row)).digest()[1:])
    return Texts(*pairs.divided(mixed, key, f"{path} has too few texts"))


def read_json_lines(path: Path) -> list[Row]:
    """Return the rows of a file, in its order; empty lines are left out.

    Raises:
        UserError: the file holds no row, or a line is none.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            found = json.loads(line.decode())
        except UnicodeDecodeError:
            raise UserError(f"{place}: not UTF-8; iconv converts a file") from None
        except ValueError as error:
            raise UserError(
                f'{place}: not JSON ({one_line(error)}); give {{"text": …}} on each line'
            ) from None
        rows.append(_row(found, place))
    if not rows:
        raise UserError(f'{path} is empty; give {{"text": …}} on each line')
    return rows


def _row(found: Any, place: str) -> Row:
    """Return the text, or the prompt and the answer, of what stands on a line."""
    names = set(found) if isinstance(found, dict) else set()
    form = next((form for form in FORMS if form <= names), None)
    if form is None:
        what = f"has {', '.join(sorted(names))[:60]}" if names else "is no object with names"
        raise UserError(f'{place}: {what}; give "text", or "prompt" and "answer"')
    row = {name: found[name] for name in sorted(form, reverse=True)}  # the prompt first
    for name, text in row.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{place}: "{name}" is no text, or an empty one')
    return row
