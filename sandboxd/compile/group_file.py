"""A group file: TOML text -> the group it describes, or every error in it, with its line.

[group]                      name, share, subnet, main, stop: as of group.py
[members.NAME]               a job of the group
argv, policy, env, cwd       and what else `Entry` has
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from sandboxd.compile.egress import problems
from sandboxd.compile.load import table
from sandboxd.compile.reading import Entries, File, Reading, did_you_mean
from sandboxd.errors import PolicyErrors
from sandboxd.group import Group
from sandboxd.policy import Limits, Network, Section


class Settings(Section, frozen=True):
    """[group]: what the members share, and when the group ends."""

    name: str = "group"
    """The domain of the members' names: NAME.GROUP."""
    share: Literal["bridge", "network"] = "bridge"
    """"bridge": a network namespace and an address each; "network": one for all, and localhost."""
    subnet: str = "192.168.100.0/24"
    """Private IPv4 for the bridge, /16 to /29."""
    main: str = ""
    """When this member ends, the others are stopped, and its status is the group's; "" is none."""
    stop: Literal["failure", "exit", "never"] = "failure"
    """What else stops the others: a member that does not end well, any that ends, or nothing."""


class Entry(Section, frozen=True):
    """[members.NAME]: one job, whose host name is NAME."""

    argv: tuple[str, ...]
    """The program and its arguments."""
    policy: str = "base"
    """A policy's name, or the path of its file from here."""
    env: dict[str, str] = msgspec.field(default_factory=dict)
    """Variables on top of the policy's."""
    cwd: str = ""
    """The working directory inside; "" is /box."""
    files: tuple[str, ...] = ()
    """What is copied into /box: "SRC" or "SRC:NAME", SRC from here."""
    stdin: str = ""
    """A file that is its stdin, from here; "" is none."""
    limits: Limits = Limits()
    """Lower ones than the policy's."""
    allow: tuple[str, ...] = ()
    """Who outside of the group may be reached: network.allow, on top of the policy's."""
    publish: tuple[str, ...] = ()
    """Ports of the host's that lead to it: network.publish, on top of the policy's."""
    address: str = ""
    """In the group's subnet; "" is the next that is free."""
    after: tuple[str, ...] = ()
    """Members that have to be ready before it is started."""
    ready: str = "started"
    """When it is: "started", "tcp:PORT", "udp:PORT" or "ended"."""


@dataclass(frozen=True, slots=True)
class GroupFile:
    """What a file says; names of files are as they stand there."""

    settings: Settings
    members: Mapping[str, Entry]

    def group(self, members: Mapping[str, Any]) -> Group:
        """The group with these members."""
        fields = msgspec.structs.asdict(self.settings)
        return Group(members=members, **fields | {"main": self.settings.main or None})


def read(label: str, text: str) -> GroupFile:
    """PolicyErrors with everything that is wrong; `label` names the file."""
    file = File(label, text, table(label, text))
    reading = Reading(file)
    for key in file.table:
        if key not in ("group", "members"):
            hint = did_you_mean(key, ("group", "members")) or "there are: [group], [members.NAME]"
            reading.refuse(key, "no such section", hint=hint)
    settings = _section(reading, Settings, file.table.get("group", {}), "group")
    members = file.table.get("members", {})
    if not isinstance(members, dict) or not members:
        reading.refuse("members", "no members", hint="write [members.NAME] with argv = [...]")
        members = {}
    entries = {
        name: _section(reading, Entry, one, f"members.{name}") for name, one in members.items()
    }
    for name, one in entries.items():
        if one is not None:
            _check(reading, f"members.{name}", one)
    if reading.errors:
        raise PolicyErrors(tuple(reading.errors))
    assert settings is not None
    return GroupFile(settings, {name: one for name, one in entries.items() if one is not None})


def _section(reading: Reading, kind: type[Any], value: object, key: str) -> Any:
    """A struct of this kind, or None after a complaint."""
    before = len(reading.found)
    plain = reading.section(kind, value, key)
    if len(reading.found) > before:
        return None
    return msgspec.convert(_lists(plain), kind)


def _lists(plain: dict[str, Any]) -> dict[str, Any]:
    """There is nothing that a list could add to here."""
    return {
        key: [item for _, item in one.items] if isinstance(one, Entries) else one
        for key, one in plain.items()
    }


def _check(reading: Reading, key: str, one: Entry) -> None:
    if not one.argv:
        reading.refuse(f"{key}.argv", "no program", hint='argv = ["python3", "server.py"]')
    for error in problems(Network(mode="user", allow=one.allow, publish=one.publish)):
        place = error.where.removeprefix("network.")
        message = str(error.args[0]).removeprefix(f"{error.where}: ")
        reading.refuse(f"{key}.{place}", message, hint=error.hint)
