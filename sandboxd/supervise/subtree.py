"""The cgroup v2 directory in which sandboxes get their leaves: found, tried, controllers enabled.

Nothing is moved: a leaf is made and removed, and what the kernel would say to a process that is
to start in it is asked with access(2). See cgroups(7) and Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sandboxd.host import CgroupSubtree

VARIABLE = "SANDBOXD_CGROUP"
CONTROLLERS = ("memory", "pids", "cpu", "io", "cpuset")

_OCCUPIED = "processes sit in the subtree itself (no internal processes: cgroups(7)), not in a leaf"
_NO_DELEGATION = "this cgroup is not delegated to us"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`subtree`, or `why_not`; `notes`: what is missing in the subtree, by its name, and why."""

    subtree: CgroupSubtree | None = None
    why_not: str = ""
    notes: dict[str, str] = field(default_factory=dict)


def find(environment: Mapping[str, str] = os.environ, proc: Path = Path("/proc")) -> Found:
    """$SANDBOXD_CGROUP if it is set, else our own cgroup."""
    top, own = mounted(proc)
    named = environment.get(VARIABLE, "")
    if named:
        return _try(Path(named), f"{VARIABLE}={named}", own, proc)
    if top is None:
        return Found(why_not="no cgroup v2 hierarchy is mounted here")
    if own is None:
        return Found(why_not="our own cgroup lies outside of what is mounted here")
    return _try(own, str(own), own, proc)


def mounted(proc: Path = Path("/proc")) -> tuple[Path | None, Path | None]:
    """Where cgroup v2 is mounted, and the directory of our own cgroup in there."""
    try:
        lines = (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines()
        groups = (proc / "self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None, None
    own = next((line[3:] for line in groups if line.startswith("0::")), None)
    top: Path | None = None
    for line in lines:
        words, _, source = line.partition(" - ")
        if source.split(" ")[0] != "cgroup2":
            continue
        root, target = (_unescape(word) for word in words.split(" ")[3:5])
        top = Path(target)
        if own is not None and ".." not in own.split("/") and Path(own).is_relative_to(root):
            return top, top / Path(own).relative_to(root)
    return top, None


def _unescape(word: str) -> str:
    """mountinfo writes blank, tab, newline and backslash in octal (proc_pid_mountinfo(5))."""
    for code in ("040", "011", "012", "134"):
        word = word.replace(f"\\{code}", chr(int(code, 8)))
    return word


def _try(path: Path, name: str, own: Path | None, proc: Path) -> Found:
    if not path.is_absolute():
        return Found(why_not=f"{name} is not an absolute path")
    path = Path(os.path.realpath(path))
    try:
        with leaf(path) as made:
            if not (made / "cgroup.procs").exists():
                return Found(why_not=f"{name} is no cgroup v2 directory")
            if refused := _cannot_enter(path, own):
                return Found(why_not=f"{name}: {refused}")
            notes = enable(path, proc)
            if refused := _not_a_domain(made):
                return Found(why_not=f"{name}: {refused}")
            return Found(subtree=_describe(path, made, notes), notes=notes)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return Found(why_not=f"{name}: {_NO_DELEGATION} ({error.strerror})")
        return Found(why_not=f"{name}: {error.strerror}")


@contextmanager
def leaf(path: Path) -> Iterator[Path]:
    """An empty cgroup below `path` for as long as the block lasts.

    Its name tells whose it is, as those of cgroups.py do: if we are killed, the next runner
    removes it.
    """
    started = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    made = path / f"sandboxd-{os.getpid()}-{started}-{secrets.token_hex(8)}"
    made.mkdir()
    try:
        yield made
    finally:
        made.rmdir()


def _cannot_enter(path: Path, own: Path | None) -> str:
    """Why no process of ours may start in a leaf below `path`; "" if it may.

    The kernel asks for write permission on cgroup.procs of the closest common ancestor of where a
    process is and where it goes (cgroup-v2.rst, "Delegation Containment").
    """
    if own is None:
        return "we are in no cgroup of the same hierarchy"
    common = Path(os.path.commonpath((path, os.path.realpath(own))))
    if os.access(common / "cgroup.procs", os.W_OK, effective_ids=True):
        return ""
    return f"sandboxd runs outside of it, in {own}, and may not write {common}/cgroup.procs"


def enable(path: Path, proc: Path = Path("/proc")) -> dict[str, str]:
    """Switch on what is off, for leaves of `path`, one by one; the reasons of what stays off.

    Nothing while processes sit in `path` itself: the kernel would refuse memory and io, but allow
    cpu and pids, and thereby make every leaf "domain invalid": no process could start in one
    (cgroup-v2.rst, "Threads"). The root of the hierarchy alone, which has no cgroup.type, is
    exempt.
    """
    occupied = (path / "cgroup.type").exists() and bool(_words(path / "cgroup.procs"))
    have = _words(path / "cgroup.subtree_control")
    offered = _words(path / "cgroup.controllers")
    notes: dict[str, str] = {}
    for name in CONTROLLERS:
        if name in have:
            continue
        if name not in offered:
            notes[f"cgroup.{name}"] = _not_offered(name, proc)
        elif occupied:
            notes[f"cgroup.{name}"] = _OCCUPIED
        else:
            _switch_on(path, name, notes)
    return notes


def _switch_on(path: Path, name: str, notes: dict[str, str]) -> None:
    try:
        (path / "cgroup.subtree_control").write_text(f"+{name}")
    except OSError as error:
        refused = f"cannot be enabled in {path}: {error.strerror}"
        notes[f"cgroup.{name}"] = _OCCUPIED if error.errno == errno.EBUSY else refused


def _not_a_domain(made: Path) -> str:
    """Why a leaf cannot hold processes; "" if it can."""
    kind = " ".join(_words(made / "cgroup.type")) or "domain"
    return "" if kind == "domain" else f"its leaves are {kind} (cgroup.type), not domains"


def _not_offered(name: str, proc: Path) -> str:
    known = {"io": "blkio"}.get(name, name)
    try:
        rows = [line.split("\t") for line in (proc / "cgroups").read_text().splitlines()]
    except OSError:
        rows = []
    row = next((row for row in rows if row[0] == known), None)
    if row and row[1] != "0":
        return "bound to cgroup v1 on this machine"
    if row and row[3] == "0":
        return "switched off at boot (cgroup_disable=)"
    return "not delegated to this cgroup" if row else "not delegated, or not in this kernel"


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _describe(path: Path, made: Path, notes: dict[str, str]) -> CgroupSubtree:
    enabled = frozenset(_words(path / "cgroup.subtree_control")) & frozenset(CONTROLLERS)
    facts = {name: (made / name).exists() for name in ("cgroup.kill", "memory.peak", "pids.peak")}
    since = {"cgroup.kill": "5.14", "memory.peak": "5.19", "pids.peak": "6.1"}
    for name, there in facts.items():
        controller = name.partition(".")[0]
        if not there and (controller == "cgroup" or controller in enabled):
            notes[name] = f"needs Linux {since[name]}"
    return CgroupSubtree(
        path=str(path),
        controllers=enabled,
        has_kill=facts["cgroup.kill"],
        has_memory_peak=facts["memory.peak"],
        has_pids_peak=facts["pids.peak"],
    )
