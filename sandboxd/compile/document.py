"""JSON that somebody else wrote, asked value by value; what is wrong is named by file and path.

`config.json: linux.seccomp.syscalls[3].action` is the place of a value, as jq(1) would have it. A
null is as good as absent, as it is to the programs that these files are written for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from sandboxd.compile.reading import did_you_mean
from sandboxd.errors import PolicyError

_PLAIN = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_LONGEST = 60
U64 = (1 << 64) - 1


class Node(msgspec.Struct, frozen=True):
    """A value and its place."""

    value: Any
    file: str
    path: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}: {self.path}" if self.path else self.file

    def wrong(self, message: str, *, hint: str = "") -> PolicyError:
        return PolicyError(self.where, message, hint=hint)

    # -- going down

    def below(self, key: str) -> Node:
        """The place of a key, whatever is there; None is its value where nothing is."""
        step = key if _PLAIN.fullmatch(key) else f"[{_shown(key)}]"
        dot = "." if self.path and not step.startswith("[") else ""
        return Node(self.table.get(key), self.file, f"{self.path}{dot}{step}")

    def get(self, key: str) -> Node | None:
        """What is at a key; None where nothing is."""
        found = self.below(key)
        return None if found.value is None else found

    def need(self, key: str) -> Node:
        found = self.get(key)
        if found is None:
            raise self.wrong(f"{key} is missing")
        return found

    def entries(self, key: str) -> list[Node]:
        """The entries of the list at a key; none where nothing is."""
        found = self.get(key)
        return [] if found is None else found.items

    def present(self) -> Iterator[str]:
        """The keys that have a value."""
        return (key for key, value in self.table.items() if value is not None)

    def only(self, *known: str) -> None:
        """PolicyError if there is any other key."""
        for key in self.table:
            if key not in known:
                hint = did_you_mean(key, known) or f"there are: {', '.join(known)}"
                raise self.below(key).wrong("no such key", hint=hint)

    # -- as what it is meant

    @property
    def table(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.wrong(f"{_kind(self.value)} where an object belongs")
        return self.value

    @property
    def items(self) -> list[Node]:
        if not isinstance(self.value, list):
            raise self.wrong(f"{_kind(self.value)} where a list belongs")
        return [Node(one, self.file, f"{self.path}[{at}]") for at, one in enumerate(self.value)]

    @property
    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong(f"{_kind(self.value)} where a string belongs")
        try:
            self.value.encode()
        except UnicodeEncodeError:
            raise self.wrong("half of a surrogate pair: this is no text") from None
        return self.value

    @property
    def truth(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong(f"{_kind(self.value)} where true or false belongs")
        return self.value

    def number(self, low: int = 0, high: int = U64) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.wrong(f"{_kind(self.value)} where a whole number belongs")
        if not low <= self.value <= high:
            raise self.wrong(f"{_shown(self.value)} is not from {low} to {high}")
        return self.value

    def texts(self, key: str) -> tuple[str, ...]:
        """The list of strings at a key; none where nothing is."""
        return tuple(one.text for one in self.entries(key))


def read(text: str, file: str, path: str = "") -> Node:
    """The document; `path` is what its top is called where it is part of a larger one."""
    try:
        return Node(json.loads(text), file, path)
    except RecursionError:
        raise PolicyError(file, "not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"{file}:{error.lineno}:{error.colno}"
        raise PolicyError(where, f"not JSON: {error.msg[:1].lower()}{error.msg[1:]}") from None
    except ValueError:  # a number with thousands of digits
        raise PolicyError(file, "not JSON: a number with too many digits") from None


def _kind(value: object) -> str:
    names: tuple[tuple[Any, str], ...] = (
        (str, "a string"), (bool, "true or false"), (int, "a number"), (float, "a fraction"),
        (list, "a list"), (dict, "an object"),
    )  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), "nothing")


def _shown(value: object) -> str:
    text = json.dumps(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
