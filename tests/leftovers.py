"""What a test may leave behind: taken before it, compared after it.

Processes are looked for in two places. Our children, zombies too: somebody forgot to wait. And all
members of the delegated cgroup subtree: nobody gets out of it, so a daemon that forked twice is
seen as well. Without a subtree (no SANDBOXD_CGROUP) such a daemon is not seen. pytest is no
subreaper on purpose: orphans would then behave differently in tests from how they do in life.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STRETCH = max(1.0, float(os.environ.get("SANDBOXD_TEST_SLOW", "1")) / 4)
"""Time limits of tests are multiplied by it. They are generous: a quarter of what the machine is
slower (./do vm says how much that is) will do."""

PATIENCE = 10.0 * STRETCH  # the kernel takes namespaces apart after the last process is gone
PAUSE = 0.005

KEPT = frozenset({"sandboxd", "crun"})  # made once, and stays; what is inside of it is looked at
FOREIGN = ("pytest-of-", "hsperfdata_", "dbus-1")  # tmp_path; a JVM's; systemd's

Thing = tuple[str, ...]
"""Kind first, then what tells one from another: same pid and start time, same process."""


def stat(pid: str) -> list[str]:
    """The fields of /proc/PID/stat from the state on; [] if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def process(pid: str) -> Iterator[Thing]:
    if fields := stat(pid):
        yield "process", pid, fields[19]


def children() -> Iterator[Thing]:
    ours = str(os.getpid())
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if stat(pid)[1:2] == [ours]:
            yield from process(pid)


def cgroups() -> Iterator[Thing]:
    top = os.environ.get("SANDBOXD_CGROUP")
    for folder, _, _ in os.walk(top) if top else ():
        yield "cgroup", folder
        try:
            pids = Path(folder, "cgroup.procs").read_text().split()
        except OSError:  # removed meanwhile
            continue
        for pid in pids:
            if pid != str(os.getpid()):
                yield from process(pid)


def mounts() -> Iterator[Thing]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        yield "mount", fields[0], fields[4], line.partition(" - ")[2]


def descriptors() -> Iterator[Thing]:
    for number in os.listdir("/proc/self/fd"):
        try:
            yield "descriptor", number, os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the one that listed them
            continue


def entries() -> Iterator[Thing]:
    """Files and directories where sandboxd puts things; only if ./do made these places for us."""
    if "SANDBOXD_TEST_DIR" not in os.environ:
        return
    state = Path(os.environ["XDG_STATE_HOME"])
    runtime = Path(os.environ["XDG_RUNTIME_DIR"])
    temporary = Path(os.environ["TMPDIR"])
    for place in (state, state / "sandboxd", runtime, runtime / "sandboxd", temporary):
        for name in os.listdir(place) if place.is_dir() else ():
            if name not in KEPT and not name.startswith(FOREIGN):
                yield "entry", str(place / name)


KINDS: tuple[Callable[[], Iterator[Thing]], ...] = (
    children,
    cgroups,
    mounts,
    descriptors,
    entries,
)


def now() -> set[Thing]:
    return {thing for kind in KINDS for thing in kind()}


def describe(thing: Thing) -> str:
    if thing[0] != "process":
        return " ".join(thing)
    try:
        name = Path(f"/proc/{thing[1]}/comm").read_text().strip()
        argv = (
            Path(f"/proc/{thing[1]}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")
        )
        where = Path(f"/proc/{thing[1]}/cgroup").read_text().splitlines()[-1]
    except OSError as error:
        return f"process {thing[1]} ({error.strerror})"
    return f"process {thing[1]} {name} state {stat(thing[1])[:1]} {where}: {argv[:200]}"


def since(before: set[Thing], ignored: Callable[[Thing], bool] = lambda _: False) -> list[str]:
    """What was not there before, once waiting no longer helps; [] is what one wants."""
    deadline = time.monotonic() + PATIENCE
    while left := {thing for thing in now() - before if not ignored(thing)}:
        if time.monotonic() > deadline:
            return [describe(thing) for thing in sorted(left)]
        time.sleep(PAUSE)
    return []
