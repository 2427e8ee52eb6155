"""A group file and what it names: policies, files, stdin, all looked for beside it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from sandboxd.compile.group_file import Entry, read
from sandboxd.errors import PolicyError
from sandboxd.group import Group, Member
from sandboxd.job import Input, Job
from sandboxd.policy import Policy
from sandboxd.supervise import policies

LONGEST = 1 << 20
"""Bytes of a group file."""


def load_group(path: str | os.PathLike[str]) -> Group:
    """The group that a file describes. PolicyErrors with all that is wrong in it."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise PolicyError(str(file), f"cannot be read: {why}") from None
    if len(text) > LONGEST:
        raise PolicyError(str(file), f"more than {LONGEST} bytes: this is no group")
    label = os.path.normpath(file)
    found = read(label, text)
    return found.group({name: _member(file, name, one) for name, one in found.members.items()})


def _member(file: Path, name: str, one: Entry) -> Member:
    job = Job(
        argv=one.argv,
        policy=_policy(file, name, one),
        env=dict(one.env),
        cwd=one.cwd or None,
        stdin=file.parent / one.stdin if one.stdin else b"",
        files=_files(file, name, one),
        limits=one.limits,
        id=None,
    )
    return Member(job=job, address=one.address or None, after=one.after, ready=one.ready)


def _files(file: Path, name: str, one: Entry) -> dict[str | bytes, Input]:
    found: dict[str | bytes, Input] = {}
    for number, text in enumerate(one.files):
        source, _, inside = text.partition(":")
        where = file.parent / source
        if not where.exists():
            key = f"{file}: members.{name}.files[{number}]"
            raise PolicyError(key, f"{where}: no such file or directory")
        found[inside or os.path.basename(os.path.normpath(source))] = where
    return found


def _policy(file: Path, name: str, one: Entry) -> str | Policy:
    """The policy that is named, with whom the entry opens on top of it; its name will do alone."""
    wanted = str(file.parent / one.policy) if policies.is_path(one.policy) else one.policy
    base = policies.find(wanted)
    if not (one.allow or one.publish):
        return base if policies.is_path(one.policy) else one.policy
    more = {
        key: (*getattr(base.network, key), *entries)
        for key, entries in (("allow", one.allow), ("publish", one.publish))
    }
    network = msgspec.structs.replace(base.network, mode="user", **more)
    places = {f"network.{key}": f"{file}: members.{name}.{key}"
              for key, entries in more.items() if entries}  # fmt: skip
    places["network.mode"] = next(iter(places.values()))
    return msgspec.structs.replace(
        base, name=f"{base.name}+group", network=network, origins=base.origins | places
    )
