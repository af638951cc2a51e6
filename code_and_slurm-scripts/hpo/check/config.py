"""A configuration that notes what it is asked for: does train_model read a parameter?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Config(dict[str, Any]):
    """A configuration that notes which of its values are asked for by name.

    A copy (`**config`, dict(config), items()) asks for all of them, which proves nothing: then
    ALL is noted, too.
    """

    ALL = "**"

    def __init__(self, config: Mapping[str, Any], read: set[str]) -> None:
        super().__init__(config)
        self.read = read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, as dict.get does."""
        self.read.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.read.add(self.ALL)  # without this method, Python would copy it unseen
        return super().__iter__()

    def keys(self) -> Any:
        """Return the keys, as dict.keys does."""
        self.read.add(self.ALL)
        return super().keys()

    def values(self) -> Any:
        """Return the values, as dict.values does."""
        self.read.add(self.ALL)
        return super().values()

    def items(self) -> Any:
        """Return the pairs, as dict.items does."""
        self.read.add(self.ALL)
        return super().items()

    def copy(self) -> dict[str, Any]:
        """Return a copy, as dict.copy does."""
        self.read.add(self.ALL)
        return dict(super().items())
