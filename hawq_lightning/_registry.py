"""The one shape of all that can be added: layer kinds, estimators, quantizers, costs, scores, selectors, exporters.

An entry is one object that says what it is called, what it needs and what it offers, so that no caller compares names.
A user's own is added from the user's own file, by the ``register_...`` function of its package's face.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from hawq_lightning._errors import HawqError, nearest

Entry = TypeVar("Entry")
_REGISTRIES: dict[str, Registry[Any]] = {}


def check_registered(what: str, name: str) -> None:
    """Refuse a name that no entry has; for configs, which know the registries by what they hold only.

    Raises:
        HawqError: there is no such entry; the message lists the names and suggests the nearest.
    """
    _REGISTRIES[what].check(name)


class Registry(Generic[Entry]):
    """Entries by name, in the order in which they were added.

    Args:
        what: singular noun for messages, such as ``"cost"``.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, Entry] = {}
        self._origins: dict[str, tuple[str, str]] = {}  # module and name of what was registered
        _REGISTRIES[what] = self

    def add(self, name: str, entry: Entry, source: object = None) -> Entry:
        """Make an entry known by ``name``; a module that is imported again may add its entry again.

        Args:
            name: lower-case letters, digits and underscores; it goes into plans, configs and checkpoints.
            entry: the object.
            source: the class or function that the entry is made of, where that is not the entry itself or its class.

        Returns:
            the entry.

        Raises:
            HawqError: a malformed name, or another entry has it.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise HawqError(f"{name!r} is no name for a {self.what}; use lower-case letters, digits and underscores.")
        origin = _origin(entry if source is None else source)
        if self._origins.get(name, origin) != origin:
            raise HawqError(f"There is a {self.what} {name!r} already, {'.'.join(self._origins[name])}.")
        self._entries[name], self._origins[name] = entry, origin
        return entry

    def remove(self, name: str) -> None:
        """Forget an entry: for a notebook that defines it anew, and for tests.

        Raises:
            HawqError: there is none.
        """
        self.check(name)
        del self._entries[name], self._origins[name]

    def __getitem__(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            HawqError: there is none; the message lists the names and suggests the nearest.
        """
        self.check(name)
        return self._entries[name]

    def check(self, name: str) -> None:
        """Refuse an unknown name.

        Raises:
            HawqError: there is no such entry; the message lists the names and suggests the nearest.
        """
        if name not in self._entries:
            raise HawqError(
                f"There is no {self.what} {name!r}; use one of {', '.join(self._entries)}."
                f"{nearest(str(name), self._entries)} {self.what.capitalize()}s of your own are known once imported."
            )

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in the order of registration."""
        return tuple(self._entries)


def _origin(entry: object) -> tuple[str, str]:
    """Where an entry was defined: its own module and name, or those of its class."""
    named = entry if hasattr(entry, "__qualname__") else type(entry)
    return str(getattr(named, "__module__", "")), str(getattr(named, "__qualname__", ""))
