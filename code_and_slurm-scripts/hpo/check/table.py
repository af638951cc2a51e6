"""The table of a check: rows as they are found, and the whole of it at the end."""

from __future__ import annotations


class Table:
    """Rows of a name, a verdict and a text; a verdict is one of VERDICTS."""

    VERDICTS = ("ok", "MEND", "look", "about", "-")  # "-": not tried, or not to be said

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, name: str, verdict: str, text: str) -> None:
        """Note a row."""
        self.rows.append((name, verdict, text))

    @property
    def to_mend(self) -> list[str]:
        """The names of the rows with MEND."""
        return [name for name, verdict, _ in self.rows if verdict == "MEND"]

    def show(self) -> None:
        """Print all rows: below whatever the script has printed itself."""
        for name, verdict, text in self.rows:
            print(f"{name:16} {verdict:6} {text}")


def progress(text: str) -> None:
    """Say what is being tried: the table comes at the end, which may take minutes."""
    print(f"    … {text}", flush=True)
