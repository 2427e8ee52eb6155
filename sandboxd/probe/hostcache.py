"""Remembers what the prober found, for as long as nothing it depends on has changed.

One JSON file, written to a neighbour and renamed. It is an optimisation: whatever is wrong with
it, or with its directory, it is as if it were not there. It is believed only if it is ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from sandboxd.plan import IdMap
from sandboxd.probe.attempts import SOURCES, Outcome, Tools, pack, unpack

_LARGEST = 1 << 20

_KINDS = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time")
_SYSCTLS = (
    *(f"user/max_{kind}_namespaces" for kind in _KINDS),
    "kernel/unprivileged_userns_clone",
    "kernel/apparmor_restrict_unprivileged_userns",
    "vm/memfd_noexec",
)
_FILES = ("/", "/dev/fuse", "/dev/net/tun", "/etc/subuid", "/etc/subgid")
_STATUS = ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Seccomp_filters")


def folder() -> Path | None:
    """$XDG_CACHE_HOME/sandboxd, ~/.cache/sandboxd; None without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(named):  # to be ignored then, says the XDG base directory specification
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        named = os.path.join(home, ".cache")
    return Path(named, "sandboxd")


def key(tools: Tools, ids: IdMap | None) -> dict[str, str]:
    """Everything that the outcomes depend on and that can be had by reading."""
    system = os.uname()
    status = dict(line.partition(":\t")[::2] for line in _read("/proc/self/status").splitlines())
    return {
        "sandboxd": _digest(SOURCES),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "kernel": f"{system.release} {system.version} {system.machine}",
        "who": f"{os.getresuid()} {os.getresgid()} {sorted(os.getgroups())}",
        "ids": repr(ids),
        "label": _read("/proc/self/attr/current"),
        **{name: status.get(name, "") for name in _STATUS},
        **{name: _read(f"/proc/sys/{name}") for name in _SYSCTLS},
        **{name: _namespace(name) for name in ("user", "mnt", "pid")},
        **{name: f"{path} {_mark(path)}" for name, path in tools.found().items()},
        **{path: _mark(path) for path in _FILES},
    }


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _digest(paths: Iterable[str]) -> str:
    """Of the programs that made the outcomes: more exact than a version, also in a checkout."""
    return f"{zlib.crc32(b''.join(Path(path).read_bytes() for path in paths)):x}"


def _namespace(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{name}")
    except OSError:
        return ""


def _mark(path: str) -> str:
    """What changes when a file is written, replaced, or given other permissions."""
    try:
        found = os.stat(path)
    except OSError:
        return "absent"
    who = f"{found.st_mode:o} {found.st_uid} {found.st_gid} {found.st_dev} {found.st_ino}"
    return f"{who} {found.st_size} {found.st_mtime_ns}" if stat.S_ISREG(found.st_mode) else who


def load(wanted: Mapping[str, str]) -> dict[str, Outcome]:
    """The outcomes kept under this key; none if there are none."""
    where = folder()
    if where is None:
        return {}
    try:
        descriptor = os.open(
            where / "host.json", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except OSError:
        return {}
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        ours = about.st_uid == os.geteuid() and not about.st_mode & 0o022
        if not ours or not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST:
            return {}
        try:
            kept = json.loads(file.read())
        except (OSError, ValueError, RecursionError):
            return {}
    match kept:
        case {"key": found, "outcomes": outcomes} if found == wanted:
            return unpack(outcomes)
    return {}


def save(wanted: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> None:
    """Keep them; a directory that cannot be written, or is not ours, is left alone."""
    where = folder()
    if where is None:
        return
    with contextlib.suppress(OSError):
        if not _is_ours(where):
            return
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps({"key": dict(wanted), "outcomes": pack(outcomes)}, indent=1)
        _replace(where / "host.json", text)


def _is_ours(where: Path) -> bool:
    """Root with the HOME of somebody else must not leave its own files there."""
    there = next(path for path in (where, *where.parents) if path.exists())
    return there.stat().st_uid == os.geteuid()


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".host.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
