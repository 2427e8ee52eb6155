"""Which rung of the ladder is taken, and what it is made of: tables, and what can be done here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio

from sandboxd.cgroup import ladder, own, subtree, systemd
from sandboxd.cgroup.ladder import VARIABLE, Climb, climbed
from sandboxd.cgroup.leaves import has_room_for_one_more, slots_within
from sandboxd.cgroup.subtree import Found
from sandboxd.errors import HostError
from sandboxd.host import CgroupSubtree
from sandboxd.job import Job
from sandboxd.policy import Limits
from sandboxd.supervise.runner import open_runner
from tests.supervise.variants import policy

pytestmark = pytest.mark.root_ok

TOP = "/sys/fs/cgroup"
USER = f"{TOP}/user.slice/user-1000.slice"
MANAGER = f"{USER}/user@1000.service"


@pytest.mark.parametrize(
    ("own_path", "expected"),
    [
        (f"{TOP}", [TOP]),
        (f"{TOP}/lab/init", [f"{TOP}/lab/init", f"{TOP}/lab", TOP]),
        (f"{MANAGER}/app.slice/x.scope", [f"{MANAGER}/app.slice/x.scope"]),
        (
            f"{MANAGER}/app.slice/x.scope/a",
            [f"{MANAGER}/app.slice/x.scope/a", f"{MANAGER}/app.slice/x.scope"],
        ),
        (f"{TOP}/system.slice/judge.service", [f"{TOP}/system.slice/judge.service"]),
        (f"{USER}", []),
    ],
)
def test_a_delegation_ends_at_the_unit(own_path: str, expected: list[str]) -> None:
    assert own.candidates(Path(TOP), Path(own_path)) == list(map(Path, expected))


@pytest.mark.parametrize(
    ("own_path", "uid", "expected"),
    [
        (f"{MANAGER}/app.slice/x.scope/leaf", 1000, f"{MANAGER}/app.slice/x.scope"),
        (f"{MANAGER}/app.slice/x.scope", 1001, None),
        (f"{TOP}/system.slice/judge.service", 1000, None),
        (f"{TOP}/system.slice/judge.service", 0, f"{TOP}/system.slice/judge.service"),
        (f"{TOP}/lab/init", 0, None),
        (f"{USER}/session-1.scope", 1000, None),
    ],
)
def test_where_owning_files_means_nothing(own_path: str, uid: int, expected: str | None) -> None:
    found = own.unit_in_doubt(Path(own_path), uid)
    assert (found and str(found)) == expected


@pytest.mark.parametrize(
    ("here", "uid", "expected"),
    [
        (f"{MANAGER}/app.slice/x.scope", 1000, "app.slice"),
        (f"{MANAGER}/app.slice/app-ci.slice/x.service", 1000, "app-ci.slice"),
        (f"{MANAGER}/init.scope", 1000, ""),
        (f"{USER}/session-1.scope", 1000, ""),
        (f"{TOP}/user.slice/user-0.slice/session-1.scope", 0, "user-0.slice"),
        (f"{TOP}/user.slice/user-0.slice/user@0.service/app.slice/x.scope", 0, "user-0.slice"),
        (f"{TOP}", 0, ""),
        (f"{TOP}/bare", 1000, ""),
        (None, 1000, ""),
    ],
)
def test_the_slice_of_a_scope(here: str | None, uid: int, expected: str) -> None:
    assert systemd.slice_of(Path(here) if here else None, uid) == expected


# -- which rung ------------------------------------------------------------------------------------

ALL = frozenset(subtree.CONTROLLERS)
STOCK = frozenset({"cpu", "memory", "pids"})


def offers(*controllers: str, path: str = "/x") -> Found:
    notes = {f"cgroup.{name}": "not delegated" for name in ALL - set(controllers)}
    return Found(subtree=CgroupSubtree(path=path, controllers=frozenset(controllers)), notes=notes)


NOTHING = Found(why_not="no")


@pytest.mark.parametrize(
    ("rungs", "taken", "passed", "tried"),
    [
        ([offers(*ALL), offers(*ALL)], "0", [], 1),
        ([offers(*STOCK), offers(*ALL)], "0", [], 1),  # io and cpuset limit nothing by default
        ([NOTHING, offers(*STOCK)], "1", ["0"], 2),
        ([offers(), offers(*STOCK)], "1", ["0"], 2),
        ([offers("cpu", "pids"), NOTHING, offers()], "0", ["1", "2"], 3),
        ([offers(), offers("pids"), offers("cpu")], "1", ["0", "2"], 3),
        ([offers(), NOTHING, offers()], "0", ["1", "2"], 3),
        ([NOTHING, NOTHING], "", ["0", "1"], 2),
    ],
)
def test_which_rung(rungs: list[Found], taken: str, passed: list[str], tried: int) -> None:
    """Whatever is not taken is closed at once, and what is taken when the stack closes."""
    opened: list[str] = []
    closed: list[str] = []

    def look(name: str, found: Found) -> ladder.Look:
        def looks(stack: ExitStack) -> Found:
            opened.append(name)
            stack.callback(closed.append, name)
            return found

        return looks

    with ExitStack() as stack:
        named = {str(number): look(str(number), found) for number, found in enumerate(rungs)}
        climb = ladder.choose(named, stack)
        assert climb.rung == taken
        assert list(climb.passed) == passed
        assert len(opened) == tried
        assert closed == [name for name in opened if name != taken]
        assert bool(climb.subtree) == bool(taken)
    assert sorted(closed) == opened
    if not taken:
        assert climb.found.why_not == "no; no"


def test_a_rung_that_fails_leaves_nothing_open() -> None:
    closed: list[str] = []

    def first(stack: ExitStack) -> Found:
        stack.callback(closed.append, "first")
        return offers()

    def second(stack: ExitStack) -> Found:
        stack.callback(closed.append, "second")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
        ladder.choose({"first": first, "second": second}, stack)
    assert closed == ["second", "first"]


def test_why_a_lesser_rung_was_passed() -> None:
    with ExitStack() as stack:
        climb = ladder.choose({"a": lambda _: offers("pids"), "b": lambda _: offers(*ALL)}, stack)
    assert climb.passed == {"a": "/x: no memory controller (not delegated)"}


# -- what is given ---------------------------------------------------------------------------------


def climb_in(cgroup: str | None, environment: dict[str, str]) -> Climb:
    with climbed(cgroup, environment) as climb:
        return climb


def test_done_without() -> None:
    for climb in (climb_in("none", {}), climb_in(None, {VARIABLE: "none"})):
        assert climb.subtree is None
        assert "done without" in climb.found.why_not
        assert list(climb.passed) == ["given"]


def test_what_is_given_is_final(tmp_path: Path) -> None:
    """Who names a directory does not want another one; the flag beats the variable."""
    climb = climb_in(str(tmp_path), {VARIABLE: "none"})
    assert climb.found.why_not == f"cgroup {tmp_path} is no cgroup v2 directory"
    assert climb.rung == ""


@pytest.mark.needs("cgroup")
def test_one_that_works(cgroup_top: Path) -> None:
    climb = climb_in(str(cgroup_top), {})
    assert climb.rung == "given"
    assert climb.subtree is not None
    assert climb.subtree.path == str(cgroup_top)


async def test_a_runner_with_one_that_does_not() -> None:
    with pytest.raises(HostError, match="/nonexistent: No such file or directory"):
        async with open_runner(cgroup="/nonexistent"):
            pytest.fail("it opened")


async def test_a_runner_without() -> None:
    async with open_runner(cgroup="none") as runner:
        assert runner.host.cgroup is None
        assert "cgroup none: done without" in runner.host.cgroup_why_not


@pytest.mark.needs("cgroup")
async def test_a_runner_in_one(cgroup_top: Path) -> None:
    inner = cgroup_top / "given"
    inner.mkdir()
    try:
        async with open_runner(cgroup=str(inner)) as runner:
            assert runner.host.cgroup
            assert runner.host.cgroup.path == str(inner)
            assert any(path.is_dir() for path in inner.glob("sandboxd-*"))
        assert not list(inner.glob("*/"))
    finally:
        inner.rmdir()


def test_without_a_bus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A runtime directory that has none is passed over; a file is no bus."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "bus").write_text("")
    assert systemd.bus(54321) == Path("/run/user/54321/bus")
    assert systemd.bus(0) == Path("/run/dbus/system_bus_socket")
    if why := systemd.answers():
        with pytest.raises(HostError, match="no such socket") as caught, systemd.open_scope():
            pytest.fail("it opened")
        assert str(caught.value) == why


# -- room ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "slots", "spares", "expected"),
    [
        (None, None, 0, 4),
        (None, 200, 9, 200),
        (250, None, 0, 4),
        (250, 123, 0, 123),
        (250, 124, 0, "at most slots=123"),
        (250, 100, 60, "at most slots=93"),
        (8, None, 0, 2),
        (5, None, 0, 1),
        (4, None, 0, "at most slots=0"),
        (0, None, 0, "at most slots=0"),
    ],
)
def test_slots_within_a_cap(
    room: int | None, slots: int | None, spares: int, expected: int | str
) -> None:
    if isinstance(expected, int):
        assert slots_within(room, slots, spares, cpus=4) == expected
        return
    with pytest.raises(HostError) as caught:
        slots_within(room, slots, spares, cpus=4)
    assert expected in caught.value.hint
    assert "cgroup.max.descendants" in str(caught.value)


@pytest.mark.parametrize(
    ("room", "slots", "spares", "expected"),
    [(None, 100, 100, True), (9, 3, 0, False), (10, 3, 0, True), (10, 3, 1, False)],
)
def test_room_for_one_more(room: int | None, slots: int, spares: int, expected: bool) -> None:
    assert has_room_for_one_more(room, slots, spares) is expected


@contextmanager
def capped(path: Path, **limits: int) -> Iterator[Path]:
    """A subtree of ours with a cap: cgroup.max.NAME."""
    path.mkdir()
    try:
        for name, value in limits.items():
            (path / f"cgroup.max.{name}").write_text(str(value))
        yield path
    finally:
        path.rmdir()


@pytest.mark.needs("cgroup")
def test_how_much_room_there_is(cgroup_top: Path) -> None:
    with capped(cgroup_top / "few", descendants=5) as few:
        assert subtree.cap(few) == 5
        with capped(few / "inner", descendants=50) as inner:
            assert subtree.cap(inner) == 4
            climb = climb_in(str(inner), {})
            assert climb.subtree
            assert climb.subtree.room == 4


@pytest.mark.needs("cgroup")
@pytest.mark.parametrize("limits", [{"descendants": 1}, {"depth": 1}, {"descendants": 0}])
def test_no_room(cgroup_top: Path, limits: dict[str, int]) -> None:
    with capped(cgroup_top / "full", **limits) as full:
        climb = climb_in(str(full), {})
        assert "cgroup.max.descendants, cgroup.max.depth" in climb.found.why_not
        assert not list(full.glob("*/"))


@pytest.mark.needs("cgroup", "userns")
async def test_a_runner_keeps_within_its_room(cgroup_top: Path) -> None:
    """All slots at once, and again under other limits: there is never one too many."""
    with capped(cgroup_top / "tight", descendants=7) as tight:
        async with open_runner(cgroup=str(tight), slots=2) as runner:
            for memory in (64 << 20, 96 << 20, 128 << 20):
                wanted = policy(limits=Limits(memory=memory, wall_time=30.0))
                async with trio.open_nursery() as nursery:
                    for _ in range(6):
                        nursery.start_soon(runner.run, Job(argv=["true"], policy=wanted))
        with pytest.raises(HostError, match="3 slots and 0 spares need 9 cgroups"):
            async with open_runner(cgroup=str(tight), slots=3):
                pytest.fail("it opened")


# -- what a dead supervisor left -------------------------------------------------------------------

# Opens a runner in the directory that is named, says so, and waits to be killed.
HOLDS = """\
import sys, trio
from sandboxd.supervise.runner import open_runner
async def main():
    async with open_runner(cgroup=sys.argv[1]):
        print("open", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.needs("cgroup")
def test_two_supervisors_and_a_dead_one(cgroup_top: Path) -> None:
    """Each has a directory of its own; only that of the dead one goes."""

    async def is_there_meanwhile(path: Path) -> bool:
        async with open_runner(cgroup=str(cgroup_top)):
            return path.is_dir()  # noqa: ASYNC240  a directory of the kernel's

    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(cgroup_top)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        [theirs] = cgroup_top.glob(f"sandboxd-{other.pid}-*")
        assert trio.run(is_there_meanwhile, theirs)
        other.kill()
        other.wait()
        assert theirs.is_dir()
        assert not trio.run(is_there_meanwhile, theirs)


@pytest.mark.needs("cgroup")
def test_a_threaded_subtree(cgroup_top: Path) -> None:
    """Its children can hold threads only, no process may start in one (cgroup-v2.rst, Threads)."""
    root = cgroup_top / "threads"
    threads = root / "some"
    threads.mkdir(parents=True)
    try:
        (threads / "cgroup.type").write_text("threaded")
        assert (root / "cgroup.type").read_text() == "domain threaded\n"
        for path in (root, threads):
            climb = climb_in(str(path), {})
            assert "its leaves are domain invalid (cgroup.type)" in climb.found.why_not
    finally:
        threads.rmdir()
        root.rmdir()
