"""--user: the names and numbers of a root, as an identity of the policy."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.errors import JobError

if TYPE_CHECKING:
    from sandboxd.policy import Identity, Policy, Root

_ROOT_IDS = (0, 0)
_NOBODY_IDS = (65534, 65534)


def identity(args: argparse.Namespace, base: Policy, root: Root) -> dict[str, Any]:
    """Who the job is; the fields of [identity] that change."""
    found: dict[str, Any] = {}
    if args.hostname is not None:
        found["hostname"] = args.hostname
    if any(mount.type != "tmpfs" and (mount.writes or mount.is_copy) for mount in args.mounts):
        found["user"] = "caller"  # else it could not write there, or leave files that nobody owns
    if args.user in ("caller", "isolated"):
        found["user"] = args.user
    elif args.user is not None:
        found["uid"], found["gid"] = _ids(args.user, base.identity, root)
    return found


def flag(args: argparse.Namespace, key: str) -> str:
    if key == "hostname":
        return "--hostname"
    return "--user" if args.user is not None and key != "user" else "--user, or a writable volume"


def _ids(text: str, identity: Identity, root: Root) -> tuple[int | None, int | None]:
    """UID[:GID], or a name that the sandbox's /etc/passwd will know."""
    user, colon, group = text.partition(":")
    if user.isdecimal() and (group.isdecimal() if colon else True):
        uid, gid = int(user), int(group or user)
        if max(uid, gid) > 65535:
            raise JobError(f"--user {text}: ids inside are below 65536")
        return uid, gid
    names = {"root": _ROOT_IDS, "nobody": _NOBODY_IDS, identity.name: (identity.uid, identity.gid)}
    if root.image:
        names |= _passwd(_file_of_image(root.image, "etc/passwd"))
    elif root.source != "host":
        with suppress(OSError):
            names |= _passwd(Path(root.source, "etc/passwd").read_text(errors="replace"))
    if colon or user not in names:
        raise JobError(
            f"--user {text}: no such user in the sandbox",
            hint=f"UID[:GID], caller, isolated, or one of {', '.join(names)}",
        )
    return names[user]


def _file_of_image(name: str, path: str) -> str:
    from sandboxd.images.store import look_up

    store, record = look_up(name)
    return store.read(record, path) or ""


def _passwd(text: str) -> dict[str, tuple[int | None, int | None]]:
    """The users of a passwd(5) that have ids we can give."""
    rows = (line.split(":") for line in text.splitlines())
    return {
        row[0]: (int(row[2]), int(row[3]))
        for row in rows
        if len(row) > 3 and row[2].isdecimal() and row[3].isdecimal()
        and max(int(row[2]), int(row[3])) < 65536
    }  # fmt: skip
