"""One policy file -> plain values that fit the types of policy.py, and every error on the way.

The types are the only description of a policy: what may be written is derived from them here, with
three additions for people. Sizes and times may have units; "unlimited" is no limit, "own" the run's
own uid or gid and "default" the kernel's, since TOML has no null; a list may begin with "!reset".
"""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal, TypeGuard

import msgspec

from sandboxd import units
from sandboxd.errors import PolicyError, PolicyErrors
from sandboxd.policy import Limits, Policy, Section

RESET = "!reset"
NOTHING = {
    "limits": "unlimited",
    "artifacts": "unlimited",
    "network": "unlimited",
    "identity": "own",
    "resources": "default",
}
"""Section -> the word that stands for None in it."""

_LAST = 1 << 62
"""The line of what is only counted: behind all others."""
MOST = 4096
"""Entries of one list: far more than any policy needs, far fewer than would hurt."""


class File(msgspec.Struct, frozen=True):
    """A policy file as it was read. `label` is its name in messages."""

    label: str
    text: str
    table: Mapping[str, Any]

    def where(self, key: str, value: object = None) -> str:
        """`judge-cpp.toml:12: limits.memory`, for a key or the nearest one that has a line."""
        number = self.line(key, value)
        return f"{self.label}:{number}: {key}" if number else f"{self.label}: {key}"

    def line(self, key: str, value: object = None) -> int:
        """The line of a key, or of this entry of a list that stands there; 0 if none is known."""
        number = self._line(key)
        if number and isinstance(value, str):  # an entry of a list of several lines
            after = self.text.split("\n")[number - 1 :]
            end = next((at for at, line in enumerate(after) if "]" in line), 0)
            quoted = (f'"{value}"', f"'{value}'")
            hits = (
                at for at, line in enumerate(after[: end + 1]) if any(q in line for q in quoted)
            )
            number += next(hits, 0)
        return number

    def _line(self, key: str) -> int:
        from sandboxd.compile.places import key_lines  # most files have nothing wrong

        numbers = key_lines(self.text)
        while key:
            if key in numbers:
                return numbers[key]
            cut = max(key.rfind("."), key.rfind("["))
            key = key[:cut] if cut > 0 else ""
        return 0


class Entries(msgspec.Struct, frozen=True):
    """A list of a file that adds to its parent's, or with `reset` takes its place."""

    reset: bool
    items: list[tuple[int, Any]]
    """With the place of each in the file; what was wrong is left out."""


class _BadError(Exception):
    """This value has been complained about and is left out."""


@cache
def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """Once for each: what its annotations mean is evaluated at each call."""
    return msgspec.structs.fields(kind)


class Reading(msgspec.Struct):
    """The values of one file, and what is wrong with it."""

    file: File
    found: list[tuple[int, PolicyError]] = msgspec.field(default_factory=list)
    """With the lines."""

    @property
    def errors(self) -> list[PolicyError]:
        """In the order of the file."""
        return [error for _, error in sorted(self.found, key=lambda one: one[0])]

    def policy(self) -> dict[str, Any]:
        """Everything in the file that is right, by section and key."""
        known = {one.name: one.type for one in _fields(Policy)}
        del known["name"], known["origins"]
        table = {key: value for key, value in self.file.table.items() if key != "extends"}
        return self._table(known, table, "")

    def section(self, kind: type[Section], value: object, key: str) -> dict[str, Any]:
        """Everything that is right in a table of this kind, wherever it stands."""
        with contextlib.suppress(_BadError):
            return self._struct(kind, value, key)
        return {}

    @property
    def _full(self) -> bool:
        """Whether what is wrong from here on will only be counted."""
        return len(self.found) >= PolicyErrors.MOST

    def refuse(self, key: str, message: str, *, hint: str = "", value: object = None) -> None:
        if self._full:
            self.found.append((_LAST, PolicyError(key, message)))
            return
        error = PolicyError(self.file.where(key, value), message, hint=hint)
        self.found.append((self.file.line(key, value), error))

    def _table(
        self, known: Mapping[str, Any], table: Mapping[str, Any], key: str
    ) -> dict[str, Any]:
        found = {}
        for name, value in table.items():
            here = f"{key}.{name}" if key else name
            if name not in known:
                self._unknown(here, name, known, key)
                continue
            with contextlib.suppress(_BadError):
                found[name] = self._value(known[name], value, here)
        return found

    def _unknown(self, here: str, name: str, known: Iterable[str], key: str) -> None:
        if here in ("name", "origins"):
            self.refuse(here, "cannot be set", hint="a policy is named after its file")
            return
        hint = "" if self._full else did_you_mean(name, known)
        if not (hint or self._full) and (sections := _sections_with(name)):
            hint = f"it belongs into [{sections[0]}]"
        what = f"[{key}] has no such key" if key else "no such section or key"
        self.refuse(here, what, hint=hint or f"there are: {', '.join(known)}")

    def _value(self, kind: Any, value: object, key: str) -> object:
        """The value in the plain form that msgspec.convert takes, or _BadError."""
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin is tuple:
            return self._list(args[0], value, key)
        structs = [one for one in args if _is_struct(one)]
        if structs and not isinstance(value, str):  # Rule | str
            return self._struct(structs[0], value, key)
        if origin is dict:
            return self._strings(value, key)
        if _is_struct(kind):
            return self._struct(kind, value, key)
        return self._scalar(str if structs else kind, value, key)

    def _struct(self, kind: type[msgspec.Struct], value: object, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.refuse(key, f"{_named(value)} where a table belongs", hint=_table_of(key))
            raise _BadError
        fields = _fields(kind)
        before = len(self.found)
        found = self._table({one.name: one.type for one in fields}, value, key)
        for one in fields:
            if one.required and one.name not in value:
                self.refuse(key, f"{one.name} is missing")
        if key.endswith("]") and len(self.found) > before:
            raise _BadError  # an entry of a list is right or left out
        return found

    def _list(self, kind: Any, value: object, key: str) -> object:
        if not isinstance(value, list):
            hint = f"write [[{key}]]" if _is_struct(kind) else 'write ["..."]'
            self.refuse(key, f"{_named(value)} where a list belongs", hint=hint)
            raise _BadError
        if len(value) > MOST:
            self.refuse(key, f"{len(value)} entries, more than {MOST}")
            raise _BadError
        inner = key.endswith("]") or "]." in key  # a rule's calls: nothing to add to
        reset = value[:1] == [RESET] and not inner
        found = []
        for at, one in list(enumerate(value))[reset:]:
            with contextlib.suppress(_BadError):
                found.append((at, self._entry(kind, one, f"{key}[{at}]")))
        return [one for _, one in found] if inner else Entries(reset, found)

    def _entry(self, kind: Any, value: object, key: str) -> object:
        if value == RESET:
            self.refuse(key, f'"{RESET}" must be the first entry', value=value)
            raise _BadError
        return self._value(kind, value, key)

    def _strings(self, value: object, key: str) -> dict[str, str]:
        if not isinstance(value, dict):
            self.refuse(key, f"{_named(value)} where a table belongs", hint=f"write [{key}]")
            raise _BadError
        found = {}
        for name, one in value.items():
            if isinstance(one, str):
                found[name] = one
            else:
                hint = f'write "{one}"' if isinstance(one, int | float) else ""
                self.refuse(f"{key}.{name}", f"{_named(one)} where a string belongs", hint=hint)
        return found

    def _scalar(self, kind: Any, value: object, key: str) -> object:
        optional = type(None) in typing.get_args(kind)
        nothing = NOTHING.get(key.partition(".")[0], "") if optional else ""
        if nothing and value == nothing:
            return None
        try:
            return msgspec.to_builtins(msgspec.convert(_without_unit(kind, value), kind))
        except msgspec.ValidationError as error:
            message, hint = _said(kind, value, str(error), nothing)
        except ValueError as error:
            message, _, hint = str(error).partition(": ")
        self.refuse(key, message, hint=hint, value=value)
        raise _BadError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is near, as a question; nothing if none is."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def unit(kind: Any) -> str:
    """What numbers of this type count: "bytes", "seconds", or "" for things."""
    for meta in getattr(kind, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.extra:
            return str(meta.extra.get("unit", ""))
    return next(filter(None, (unit(one) for one in typing.get_args(kind))), "")


def limit_unit(name: str, section: type[Section] = Limits) -> str:
    """What a key of [limits], or of another section, counts."""
    kinds = {one.name: one.type for one in msgspec.structs.fields(section)}
    return unit(kinds[name])


def _without_unit(kind: Any, value: object) -> object:
    what = unit(kind)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    if what == "bytes" and not isinstance(value, float):
        return units.parse_size(value)
    if what == "seconds":
        return units.parse_time(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number to count with")
    if isinstance(value, int) and not -1 << 63 <= value < 1 << 64:
        raise ValueError(f"{_shown(value)} does not fit into 64 bits")
    return value


def _said(kind: Any, value: object, error: str, nothing: str) -> tuple[str, str]:
    """A message for people in place of msgspec's, and what to do."""
    if typing.get_origin(kind) is Literal:
        choices = [str(one) for one in typing.get_args(kind)]
        hint = did_you_mean(str(value), choices) or f"one of {', '.join(choices)}"
        return f"{_shown(value)} is not among the choices", hint
    if "regex '^/'" in error:
        return f"{_shown(value)} is not absolute", "a path starts with /"
    wanted = error.partition(" - at ")[0].replace("`", "").replace(" | null", "")
    wanted = wanted[:1].lower() + wanted[1:]
    return f"{_shown(value)}: {wanted}", f'"{nothing}" is allowed, too' if nothing else ""


def _named(value: object) -> str:
    names: tuple[tuple[Any, str], ...] = (
        (str, "a string"), (bool, "a boolean"), (int | float, "a number"),
        (list, "a list"), (dict, "a table"),
    )  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), "a date")


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return _named(value)
    text = repr(value) if isinstance(value, str) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= 80 else f"{text[:77]}..."


def _table_of(key: str) -> str:
    return f"write [[{key.partition('[')[0]}]]" if key.endswith("]") else f"write [{key}]"


def _is_struct(kind: Any) -> TypeGuard[type[msgspec.Struct]]:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _sections_with(name: str) -> list[str]:
    return [
        one.name
        for one in msgspec.structs.fields(Policy)
        if _is_struct(one.type) and name in one.type.__struct_fields__
    ]
