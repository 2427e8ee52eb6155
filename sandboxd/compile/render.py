"""A policy as one TOML file without a parent: all that is in force, in the reference's order."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from sandboxd.compile.explain import keys, toml, written
from sandboxd.policy import Policy


def render(policy: Policy) -> str:
    """The text of a file that load() reads as the same policy."""
    return "\n".join(_lines(policy)) + "\n"


def _lines(policy: Policy) -> Iterator[str]:
    yield f"description = {toml(policy.description)}"
    yield from _entry("allow_sources", toml(policy.allow_sources), policy.allow_sources)
    if not policy.mounts:
        yield "mounts = []"
    for section in msgspec.structs.fields(Policy):
        if section.name == "mounts":
            for mount in policy.mounts:
                yield "\n[[mounts]]"
                yield from _table(mount, "mounts")
        elif section.name not in ("name", "description", "origins", "allow_sources"):
            yield f"\n[{section.name}]"
            yield from _table(getattr(policy, section.name), section.name)


def _table(struct: msgspec.Struct, section: str) -> Iterator[str]:
    tables = []
    for one in keys(struct):
        value = getattr(struct, one.name)
        if isinstance(value, dict):
            tables.append((f"{section}.{one.name}", value))
        elif section != "mounts" or value != one.default:
            yield from _entry(one.name, written(f"{section}.{one.name}", value), value)
    for key, table in tables:
        yield f"\n[{key}]"
        yield from (f"{_bare(name)} = {toml(value)}" for name, value in table.items())


def _entry(name: str, text: str, value: object) -> Iterator[str]:
    """One line, or for a list that would be longer than a terminal one for each entry."""
    if not isinstance(value, tuple) or len(text) <= 90:
        yield f"{name} = {text}"
        return
    yield f"{name} = ["
    yield from (f"    {toml(entry)}," for entry in value)
    yield "]"


def _bare(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else toml(name)
