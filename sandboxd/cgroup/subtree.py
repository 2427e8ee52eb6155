"""A cgroup v2 directory looked at: may sandboxes have their leaves in it? Controllers enabled.

Nothing is moved: a leaf is made and removed, and what the kernel would say to a process that is
to start in it is asked with access(2). Which directories are looked at is in ladder.py. See
cgroups(7) and Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from sandboxd.host import CgroupSubtree

PROC = Path("/proc")
CONTROLLERS = ("memory", "pids", "cpu", "io", "cpuset")
RARE = ("hugetlb",)
"""Used where it is offered, and missed by nobody: systemd delegates it to no user, and where no
huge pages are set aside there is nothing to limit. Where there are some, `degraded` says so."""

OCCUPIED = "processes sit in the subtree itself (no internal processes: cgroups(7)), not in a leaf"
_NO_DELEGATION = "this cgroup is not delegated to us"


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """`subtree`, or `why_not`; `notes`: what is missing in the subtree, by its name, and why."""

    subtree: CgroupSubtree | None = None
    why_not: str = ""
    notes: dict[str, str] = msgspec.field(default_factory=dict)


def mounted(proc: Path = PROC, pid: int | str = "self") -> tuple[Path | None, Path | None]:
    """Where cgroup v2 is mounted, and the directory in there of our own cgroup, or of a pid's."""
    try:
        lines = (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines()
        groups = (proc / f"{pid}/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None, None
    own = next((line[3:] for line in groups if line.startswith("0::")), None)
    top: Path | None = None
    for line in lines:
        fields, _, source = line.partition(" - ")
        if source.split(" ")[0] != "cgroup2":
            continue
        root, target = (_unescape(word) for word in fields.split(" ")[3:5])
        top = Path(target)
        if own is not None and ".." not in own.split("/") and Path(own).is_relative_to(root):
            return top, top / Path(own).relative_to(root)
    return top, None


def _unescape(word: str) -> str:
    """mountinfo writes blank, tab, newline and backslash in octal (proc_pid_mountinfo(5))."""
    for code in ("040", "011", "012", "134"):
        word = word.replace(f"\\{code}", chr(int(code, 8)))
    return word


def examine(path: Path, name: str, own: Path | None, *, let_in: bool = False) -> Found:
    """Whether our leaves can be in `path`, called `name` in reasons; what can be enabled, is.

    `own` is the cgroup our processes start in. With `let_in` somebody else moves them (systemd).
    """
    if not path.is_absolute():
        return Found(why_not=f"{name} is not an absolute path")
    path = Path(os.path.realpath(path))
    room = cap(path)
    try:
        with leaf(path) as made:
            if not (made / "cgroup.procs").exists():
                return Found(why_not=f"{name} is no cgroup v2 directory")
            if refused := "" if let_in else _cannot_enter(path, own):
                return Found(why_not=f"{name}: {refused}")
            notes = enable(path)
            if refused := _not_a_domain(made):
                return Found(why_not=f"{name}: {refused}")
            (made / "deeper").mkdir()  # as deep as a runner's leaves are
            (made / "deeper").rmdir()
            return Found(subtree=_describe(path, made, notes, room), notes=notes)
    except OSError as error:
        return Found(why_not=f"{name}: {_refused(error)}")


def _refused(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{_NO_DELEGATION} ({error.strerror})"
    if error.errno == errno.EAGAIN:  # cgroup-v2.rst, cgroup.max.descendants and cgroup.max.depth
        return "no more cgroups may be made here (cgroup.max.descendants, cgroup.max.depth)"
    return str(error.strerror)


def cap(path: Path) -> int | None:
    """How many cgroups may still be made below `path`: the least that any cgroup above leaves.

    Only what can be seen counts: the kernel also looks above the root of a cgroup namespace.
    """
    left: list[int] = []
    for folder in (path, *path.parents):
        limit = words(folder / "cgroup.max.descendants")
        if limit and limit[0].isdecimal():
            rows = words(folder / "cgroup.stat")
            have = dict(zip(rows[::2], rows[1::2], strict=False)).get("nr_descendants", "0")
            left.append(max(0, int(limit[0]) - int(have)))
    return min(left, default=None)


@contextmanager
def leaf(path: Path) -> Iterator[Path]:
    """An empty cgroup below `path` for as long as the block lasts.

    Its name tells whose it is, as those of cgroups.py do: if we are killed, the next runner
    removes it.
    """
    started = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    made = path / f"sandboxd-{os.getpid()}-{started}-{os.urandom(8).hex()}"
    made.mkdir()
    try:
        yield made
    finally:
        made.rmdir()


def limits(found: CgroupSubtree) -> bool:
    """Whether its leaves can limit what has to be limited for a whole run: memory, processes."""
    return found.controllers >= {"memory", "pids"}


def is_ours(path: Path) -> bool:
    """Whether we may make cgroups in it, put processes into it, and enable controllers."""
    names = (".", "cgroup.procs", "cgroup.subtree_control")
    return all(os.access(path / name, os.W_OK, effective_ids=True) for name in names)


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


def enable(path: Path, proc: Path = PROC) -> dict[str, str]:
    """Switch on what is off, for leaves of `path`, one by one; the reasons of what stays off.

    Nothing while processes sit in `path` itself: the kernel would refuse memory and io, but allow
    cpu and pids, and thereby make every leaf "domain invalid": no process could start in one
    (cgroup-v2.rst, "Threads"). The root of the hierarchy alone, which has no cgroup.type, is
    exempt.
    """
    occupied = (path / "cgroup.type").exists() and bool(words(path / "cgroup.procs"))
    have = words(path / "cgroup.subtree_control")
    offered = words(path / "cgroup.controllers")
    notes: dict[str, str] = {}
    for name in CONTROLLERS:
        if name in have:
            continue
        if name not in offered:
            notes[f"cgroup.{name}"] = _not_offered(name, proc)
        elif occupied:
            notes[f"cgroup.{name}"] = OCCUPIED
        else:
            _switch_on(path, name, notes)
    for name in RARE:
        if name in offered and name not in have and not occupied:
            _switch_on(path, name, {})
    return notes


def _switch_on(path: Path, name: str, notes: dict[str, str]) -> None:
    try:
        (path / "cgroup.subtree_control").write_text(f"+{name}")
    except OSError as error:
        refused = f"cannot be enabled in {path}: {error.strerror}"
        notes[f"cgroup.{name}"] = OCCUPIED if error.errno == errno.EBUSY else refused


def _not_a_domain(made: Path) -> str:
    """Why a leaf cannot hold processes; "" if it can."""
    kind = " ".join(words(made / "cgroup.type")) or "domain"
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


def words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _describe(path: Path, made: Path, notes: dict[str, str], room: int | None) -> CgroupSubtree:
    known = frozenset((*CONTROLLERS, *RARE))
    enabled = frozenset(words(path / "cgroup.subtree_control")) & known
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
        room=room,
    )
