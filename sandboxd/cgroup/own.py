"""Our own cgroup as a subtree: a unit with Delegate=, a batch system's step, a Kubernetes pod.

The kernel enables controllers only for the children of a cgroup without processes (cgroups(7), "no
internal processes"), so we move ourselves into a leaf of it, LEAF, and stay there. Nobody else is
moved. Where others sit in it, the next cgroup above is looked at, as long as it is ours as well.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from sandboxd.cgroup import subtree, systemd
from sandboxd.cgroup.subtree import CONTROLLERS, Found
from sandboxd.errors import HostError

LEAF = "sandboxd.supervisor"
_UNITS = (".service", ".scope")
_SHOWN = 3


def candidates(top: Path, own: Path) -> list[Path]:
    """Our own cgroup and those above it that somebody may have given us with it, nearest first.

    A systemd unit is where a delegation ends: what is above it is systemd's, even if the files
    belong to us, as they do below user@UID.service (systemd's CGROUP_DELEGATION.md).
    """
    found: list[Path] = []
    for path in (own, *own.parents):
        if path.name.endswith(".slice"):
            break
        found.append(path)
        if path == top or path.name.endswith(_UNITS):
            break
    return found


def unit_in_doubt(own: Path, uid: int) -> Path | None:
    """The unit we are in, where files that belong to us do not mean that it was delegated."""
    unit = next((path for path in (own, *own.parents) if path.name.endswith(_UNITS)), None)
    if unit is None:
        return None
    user = f"user@{uid}.service"
    return unit if uid == 0 or user in (path.name for path in unit.parents) else None


def find(top: Path, own: Path, where: Path = subtree.PROC) -> Found:
    """The first of our candidates that has room for leaves and can get controllers."""
    doubt = unit_in_doubt(own, os.geteuid())
    if doubt is not None and (why := _not_delegated(doubt)):
        return Found(why_not=why)
    best = Found(why_not=f"{own}: {_not_ours(own)}")
    for path in candidates(top, own):
        if path.name == LEAF:
            continue
        if not subtree.is_ours(path):
            break
        found = _settle(path, where)
        if found.subtree is None:
            best = best if best.subtree else found
        elif subtree.limits(found.subtree):
            return found
        elif best.subtree is None:
            best = found
    return best


def _not_ours(own: Path) -> str:
    """As containers have it by default: whoever it belongs to, nobody can write to it."""
    with suppress(OSError):
        if os.statvfs(own).f_flag & os.ST_RDONLY:
            return f"cgroups are mounted read-only here ({os.strerror(errno.EROFS)})"
    return "this cgroup is not delegated to us"


def _not_delegated(unit: Path) -> str:
    """Why a unit is not ours to make cgroups in; "" if it is.

    The attribute is set since systemd 251, by the system's manager only; else systemd is asked.
    """
    with suppress(OSError):
        if os.getxattr(unit, "user.delegate") == b"1":
            return ""
    if os.geteuid() == 0 and not os.path.isdir("/run/systemd/system"):
        return ""
    try:
        if systemd.delegates(unit.name):
            return ""
    except HostError as error:
        return f"{unit}: whether it has Delegate= is not known ({error.args[0]})"
    return f"{unit}: a unit without Delegate=yes"


def _settle(path: Path, proc: Path) -> Found:
    """Look at one of ours; move out of the way if that is all that is missing."""
    others, we = _members(path)
    if not _wants_controllers(path):
        return subtree.examine(path, str(path), path)
    if others:
        found = subtree.examine(path, str(path), path)
        sit = f"other processes sit in it: {_named(others, proc)}"
        notes = {key: sit if subtree.OCCUPIED in why else why for key, why in found.notes.items()}
        return Found(subtree=found.subtree, why_not=found.why_not, notes=notes)
    if not we:
        return subtree.examine(path, str(path), path)
    return _moved(path)


def _moved(path: Path) -> Found:
    """With us in a leaf of it; if nothing comes of that, we go back."""
    leaf = path / LEAF
    try:
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        with suppress(OSError):
            leaf.rmdir()
        return Found(why_not=f"{path}: we cannot move into a leaf of it: {error.strerror}")
    found = subtree.examine(path, str(path), leaf)
    if found.subtree is None:
        with suppress(OSError):
            (path / "cgroup.procs").write_text(str(os.getpid()))
            leaf.rmdir()
    return found


def _wants_controllers(path: Path) -> bool:
    """Whether there is something to enable; the hierarchy's root may have processes and all."""
    have, offered = (
        subtree.words(path / name) for name in ("cgroup.subtree_control", "cgroup.controllers")
    )
    return (path / "cgroup.type").exists() and bool(set(offered) & set(CONTROLLERS) - set(have))


def _members(path: Path) -> tuple[list[str], bool]:
    """The processes in it that are not us, "0" for those of other PID namespaces; and if we are."""
    pids = subtree.words(path / "cgroup.procs")
    us = str(os.getpid())
    return [pid for pid in pids if pid != us], us in pids


def _named(pids: list[str], proc: Path) -> str:
    names = []
    for pid in pids[:_SHOWN]:
        try:
            names.append(f"{pid} ({(proc / pid / 'comm').read_text().strip()})")
        except OSError:
            names.append(pid)
    more = f" and {len(pids) - _SHOWN} more" if len(pids) > _SHOWN else ""
    return ", ".join(names) + more
