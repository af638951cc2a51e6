"""A variable's text → a checked value, or one line that says what is legal."""

from __future__ import annotations

import ast
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from hashlib import sha1
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from hpo.files import AWAY

SQLITE_PREFIX = "sqlite:///"
OWN_SERVER = "postgresql:job"  # a PostgreSQL that runs inside the job (hpo/job/own_server.sh)
# Besides sqlite; see hpo/study/opening.py.
SERVER_URLS = ("postgresql", "postgres", "mysql", "journal", "grpc")
NEARLY = 0.9  # how alike two names are (difflib's ratio): TOTAL_TRIAL, PRUNNER; not SEEDS and SEED
SITE_FAULT = 75  # exit status; "temporary failure, try again later" in sysexits.h


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one or two lines, exit status 2."""


class SiteAway(UserError):
    """A server that may be there again in a minute, which a job waits for (`status_of`)."""


def status_of(error: UserError | OSError) -> int:
    """Return the exit status for what has ended a script. Raises it where it is a mistake of ours.

    A disk or a file server that is full or away is nobody's: 75, and the job tries again.  So it
    does with a database that is away; who types a command is told at once, as of a wrong address.
    """
    if isinstance(error, SiteAway) and "SLURM_JOB_ID" in os.environ:
        return SITE_FAULT
    if isinstance(error, UserError):
        return 2
    if error.errno in AWAY:
        return SITE_FAULT
    raise error


def end_of(error: UserError | OSError) -> int:
    """Say in a line what has ended a script, and return the status. Raises it as `status_of`."""
    status = status_of(error)
    text = without_password(error)  # a driver may say to what it could not connect
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
    return status


def misspelt(given: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return a line for each variable whose name is nearly that of a setting."""
    said = []
    for name in sorted(set(given).difference(names)):
        if near := get_close_matches(name.upper(), names, 1, NEARLY):
            said.append(f"{name} is no setting, and changes nothing: is {near[0]} meant?")
    return said


def choice(env: Mapping[str, str], name: str, legal: Sequence[str]) -> str:
    """Return the value of a variable in lower case. Raises UserError if it is not legal."""
    value = env[name].lower()
    if value not in legal:
        raise UserError(f"{name}={env[name]!r} is unknown; choose one of: {', '.join(legal)}")
    return value


def with_options(
    env: Mapping[str, str], name: str, legal: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Split "median:n_warmup_steps=5" into a legal word and its options; raises UserError.

    Whether Optuna knows the options, hpo/search says, which imports it.
    """
    word, _, options = env[name].partition(":")
    return choice({name: word}, name, legal), pairs(options, name)


def pairs(text: str, name: str) -> dict[str, Any]:
    """Return "a=1,b=adam" as {"a": 1, "b": "adam"}. Raises UserError."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in re.split(r",(?=\s*\w+\s*=)", text))):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise UserError(f"{name}: {part!r} is not NAME=VALUE (several are divided by commas)")
        if key in found:
            raise UserError(f"{name}={text!r} names {key} twice")
        found[key] = _literal(value)
    return found


def _literal(text: str) -> Any:
    """Return a number, a tuple, True, None, … as Python writes it; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def names(text: str, name: str) -> tuple[str, ...]:
    """Return the words of a list that is divided by commas. Raises UserError for one twice."""
    found = tuple(filter(None, (word.strip() for word in text.split(","))))
    if len(set(found)) < len(found):
        raise UserError(f"{name}={text!r} names one twice")
    return found


def arguments(text: str, name: str) -> tuple[str, ...]:
    """Return the words of a command line. Raises UserError for a quote that is not closed."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{name}={text!r} is no command line: {error}") from error


def directions(text: str, legal: Sequence[str], number: int) -> tuple[str, ...]:
    """Return one direction per objective; one alone is for all of them. Raises UserError."""
    words = text.split(",")
    if len(words) not in (1, number):
        raise UserError(f"DIRECTION has {len(words)} directions for {number} objectives")
    found = tuple(choice({"DIRECTION": word.strip()}, "DIRECTION", legal) for word in words)
    return found * number if len(found) == 1 else found


def integer(env: Mapping[str, str], name: str, least: int, most: int = 999_999_999) -> int:
    """Return an integer from `least` to `most`. Raises UserError."""
    text = env[name]
    legal = f"of {least} or more" if most == 999_999_999 else f"from {least} to {most}"
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise UserError(f"{name}={text!r} is not an integer {legal}")
    if len(text) > 20 or not least <= int(text) <= most:
        raise UserError(
            f"{name}={text[:20]} is out of range; give an integer from {least} to {most}"
        )
    return int(text)


def number(env: Mapping[str, str], name: str) -> float:
    """Return a number, not infinite and not NaN. Raises UserError."""
    try:
        value = float(env[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{name}={env[name]!r} is no number")
    return value


def study_name(text: str) -> str:
    """Return a study's name, which is also that of its checkpoints' folder. Raises UserError."""
    if not re.fullmatch(r"[\w][\w.+-]{0,99}", text) or len(text.encode()) > 200:
        raise UserError(
            f"STUDY_NAME={text!r} cannot be used; give letters, digits, '_', '-', '.' or '+', "
            "at most 100 of them"
        )
    return text


def readable_file(path: Path, name: str) -> Path:
    """Return the path; what is in the file, its reader checks. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{name}: there is no file {path}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{name}: no permission to read {path}")
    return path


def readable_folder(path: Path, name: str) -> Path:
    """Return the path; what is in the folder, its reader checks. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{name}: {path} is no folder")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{name}: no permission to read {path}")
    return path


def database_file(url: str, path: Path) -> Path:
    """Return the path of an SQLite study that can be there. Raises UserError."""
    if len(os.fsencode(path.name)) > 200:  # its journal, copies and folders have longer names
        raise UserError(f"STUDY_DB={url!r}: the file's name is too long (more than 200 bytes)")
    if "?" in url:
        raise UserError(f"STUDY_DB={url!r}: nothing may follow the file's name (no '?' options)")
    if not path.parent.is_dir():
        raise UserError(
            f"STUDY_DB={url!r}: the folder {path.parent} does not exist; create it first"
        )
    if path.is_dir():
        raise UserError(f"STUDY_DB={url!r}: {path} is a folder; name a file in it")
    if path.is_symlink() and not path.exists():
        raise UserError(f"STUDY_DB={url!r}: {path} is a link to a file that is not there")
    return path


def server_url(text: str) -> str:
    """Return the URL of a database server, PostgreSQL's as libpq takes it.

    Raises UserError, which does not show the URL: a part of a password may stand anywhere in it.
    """
    scheme, _, rest = text.partition("://")
    scheme = scheme.split("+")[0] if scheme.startswith("postgres") else scheme
    if scheme not in ("postgresql", "postgres"):
        login = rest.rpartition("@")[0] if scheme.startswith("mysql") else ""
        if re.search(r"[/?#@\s]", login):  # readers of URLs do not agree on what it means
            raise UserError("STUDY_DB: in a password write / ? # @ as %2F %3F %23 %40")
        return text
    user, at, place = rest.rpartition("@")
    host, _, path = place.partition("/")
    form = "postgresql://user:password@host/database"
    if re.search(r"[/?#@\s]|%(?![0-9a-fA-F]{2})", user) or user.count(":") > 1:
        raise UserError(
            f"STUDY_DB is no {form}: in a password write / ? # @ : % as %2F %3F %23 %40 %3A %25"
        )
    if unquote(user.partition(":")[2]) == "***":
        raise UserError("STUDY_DB: put the password in the place of ***, or in ~/.pgpass")
    if not re.fullmatch(r"(?:[^:\[\]]*|\[[^\]]*\])(?::\d*)?", host) and "," not in host:
        raise UserError(f"STUDY_DB is no {form}: the port is a number")
    if not path.partition("?")[0]:
        raise UserError(f"STUDY_DB names no database; give {form}")
    return f"postgresql://{user}{at}{place}"


def password_of(url: str) -> set[str]:
    """Return the passwords in a URL, as they stand there and as they are."""
    user = url.partition("://")[2].rpartition("@")[0]
    found = {user.partition(":")[2], *re.findall(r"[?&]\w*password=([^&]*)", url)}
    return {word for text in found if text for word in (text, unquote(text))}


def without_password(text: object) -> str:
    """Return a text in which no URL has its password any more: whatever is printed or stored.

    Those before the host (postgresql://user:***@host), and those in the options of a URL or of a
    driver (password=***).
    """
    found = re.sub(r"(\w://[^\s/:@]*):\S*@", r"\1:***@", str(text))
    return re.sub(r"(?i)\b(\w*(?:password|passwd|pwd)=)[^\s&]+", r"\1***", found)


def server_name(url: str) -> str:
    """Return a name for files of the database behind a URL: no two databases share it."""
    if url == OWN_SERVER:
        return "postgresql-job"
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    host = parts.netloc.rpartition("@")[2].lower() or query.get("host", "local")
    scheme = parts.scheme.split("+")[0]
    port = f":{query['port']}" if "port" in query else ""
    place = f"{host}{port}".removesuffix(":5432" if scheme == "postgresql" else ":")
    text = f"{scheme}-{parts.path.lstrip('/')}@{place}{query.get('options', '')}"
    name = re.sub(r"[^\w.@-]", "_", text, flags=re.ASCII)[:100]
    return name if name == text else f"{name}-{sha1(text.encode()).hexdigest()[:8]}"


def check_writable(path: Path) -> None:
    """Raise UserError where SQLite could not write, which takes the folder, too: its journal."""
    for needed in (path.parent, path):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise UserError(f"STUDY_DB: no permission to write {needed}")


def final_seeds(env: Mapping[str, str], finalists: int, total: int, objectives: int) -> int:
    """Return FINAL_SEEDS: 0 for none, or so many that TOTAL_TRIALS leaves a search. Raises."""
    seeds = integer(env, "FINAL_SEEDS", 0, 20)
    if seeds > 1 and objectives > 1:
        raise UserError("FINAL_SEEDS ranks by a mean of one objective; for several give 0")
    if seeds > 1 and total < finalists * seeds:
        raise UserError(
            f"FINAL_SEEDS={seeds} takes {finalists * (seeds - 1)} of TOTAL_TRIALS={total}; give "
            f"TOTAL_TRIALS={finalists * seeds} or more, or FINAL_SEEDS=0"
        )
    return seeds


def other_study(
    text: str, own: tuple[str, str], url_of: Callable[[str], str]
) -> tuple[str, str] | None:
    """Return STUDY_DB and STUDY_NAME of FROM_STUDY; None without it. Raises UserError."""
    if not text:
        return None
    database, _, name = text.rpartition(":")
    try:
        url = database if "://" in database else f"{SQLITE_PREFIX}{database}"
        found = (url_of(url) if database else own[0]), study_name(name)
    except UserError:  # its words are about STUDY_DB, and show a password
        raise UserError(
            "FROM_STUDY names no study; give the NAME of one in STUDY_DB, or FILE:NAME or URL:NAME,"
            " e.g. FROM_STUDY=old.db:mnist_hpo"
        ) from None
    if found == own:
        raise UserError(f"FROM_STUDY={name} is the study itself; name another one")
    return found


def py_script(text: str, folder: Path) -> str:
    """Return the path of the script from `folder`: the bundle may be moved, and have subfolders."""
    path = os.path.relpath(folder / text, folder)
    if not path.endswith(".py") or len(os.fsencode(path)) > 250:
        raise UserError(f"PY_SCRIPT={text!r} is no Python script; give its name, e.g. my_model.py")
    return path


def study_url(text: str, folder: Path) -> str:
    """Return STUDY_DB in the form that the bundle uses.  Raises UserError if it is not legal."""
    if text == OWN_SERVER:
        return text
    scheme = urlsplit(text).scheme.split("+")[0]
    if text.startswith(SQLITE_PREFIX) and len(text) > len(SQLITE_PREFIX):
        # Relative paths start at `folder`, not at the cwd; an absolute right-hand side replaces it.
        path = database_file(text, folder / text[len(SQLITE_PREFIX) :])
        return f"{SQLITE_PREFIX}{path}"
    if scheme in SERVER_URLS and "://" in text:
        return server_url(text)
    shown = without_password("".join(text.split()))  # a blank would divide a password
    raise UserError(
        f"STUDY_DB={shown!r} is no URL that can be used here; "
        "give sqlite:///study.db (or sqlite:////absolute/path/study.db), or "
        f"postgresql://user:password@host/database, or {OWN_SERVER}"
    )
