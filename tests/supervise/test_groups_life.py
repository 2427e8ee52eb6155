"""Groups begin and end whole, whatever ends: nothing of them is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest
import trio

from sandboxd.errors import LaunchError
from sandboxd.group import Group, Member
from sandboxd.host import Place
from sandboxd.job import Job
from sandboxd.policy import Mount
from sandboxd.supervise.groups import NO_WAY_OUT, listeners
from sandboxd.supervise.runner import Runner, open_runner
from sandboxd.supervise.seat import Seat
from tests.supervise.members import SERVE, job, read, said, waiting
from tests.supervise.variants import policy


def namespaces() -> int:
    """Of networks, that somebody of ours is in or holds."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            if (target := os.readlink(f"/proc/self/fd/{fd}")).startswith("net:"):
                found.add(target)
        except OSError:
            continue
    return len(found)


async def test_many_in_a_row_leave_nothing() -> None:
    """No process (the fixture looks), interface, namespace or descriptor."""
    members = {
        "db": Member(job=job(SERVE), ready="tcp:5432"),
        "web": Member(job=job("found['x'] = reach('db', 5432)"), after=["db"]),
    }
    async with open_runner(slots=2, cgroup="none") as runner:
        await runner.run_group(Group(members=members))
        interfaces = os.listdir("/sys/class/net")
        before = len(os.listdir("/proc/self/fd")), namespaces()  # with what is still ending
        for _ in range(24):
            found = await runner.run_group(Group(members=members))
            assert [one.status for one in found.values()] == ["ok", "ok"]
        with trio.fail_after(10):
            while (  # noqa: ASYNC110  nobody tells when the last init is reaped
                len(os.listdir("/proc/self/fd")) > before[0]
                or namespaces() > before[1]
                or os.listdir("/sys/class/net") != interfaces
            ):
                await trio.sleep(0.01)


async def test_leaving_kills_all() -> None:
    async with open_runner(slots=2) as runner:
        async with runner.start_group(waiting("a", "b")) as live:
            await read(live, lambda _, event: event.type == "stdout")
        assert runner.statistics().running == 0
        assert runner._limiter.borrowed_tokens == 0


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03, 0.1, 0.3])
async def test_cancelled_at_any_time(seconds: float) -> None:
    """Set up half-way or running: the fixture finds what is left."""
    async with open_runner(slots=3) as runner:
        with trio.move_on_after(seconds):
            await runner.run_group(waiting("a", "b", "c"))
        assert runner._limiter.borrowed_tokens == 0
        found = await runner.run_group(Group(members={"x": job("found['y'] = 1")}))
        assert said(found["x"]) == {"y": 1}


def pids(name: str) -> list[int]:
    """Our children that have this in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if name.encode() in words and int(parent) == os.getpid():
            found.append(int(pid))
    return found


async def test_the_netkeeper_is_not_needed_any_more() -> None:
    """A bridge is the kernel's; the next group has a new one."""
    asks = job(
        "print('up', flush=True); sys.stdin.read(); found['x'] = reach('db', 5432)", stdin=None
    )
    members = {"db": Member(job=job(SERVE), ready="tcp:5432"),
               "web": Member(job=asks, after=["db"])}  # fmt: skip
    async with open_runner(slots=2) as runner:
        async with runner.start_group(Group(members=members)) as live:
            await read(live, lambda name, event: name == "web" and event.type == "stdout")
            (keeper,) = pids("sandboxd.launch.netkeeper")
            os.kill(keeper, signal.SIGKILL)
            stdin = live.runs["web"].stdin
            assert stdin is not None
            await stdin.aclose()
            await read(live, lambda name, event: name == "web" and event.result is not None)
            assert said((await live.wait())["web"])["x"].startswith("hello")
        again = {name: job("found['x'] = 1") for name in "ab"}
        assert (await runner.run_group(Group(members=again)))["a"].status == "ok"


async def killed(runner: Runner) -> None:
    async with runner.start_group(waiting("a", "b")) as live:
        await read(live, lambda _, event: event.type == "stdout")
        for pid in pids("sandboxd-tenant"):
            os.kill(pid, signal.SIGKILL)
        await read(live, lambda *_: False)
        await live.wait()


async def test_a_tenant_that_is_killed_is_an_error() -> None:
    async with open_runner(slots=2) as runner:
        with pytest.raises(LaunchError):
            await killed(runner)
        found = await runner.run_group(Group(members={"x": job("found['y'] = 1")}))
        assert said(found["x"]) == {"y": 1}


@pytest.mark.parametrize("which", ["first", "second"])
async def test_a_tenant_that_shares_is_killed(which: str) -> None:
    """The user namespace of the first one's is the other's; both come anew, in another one."""
    other = msgspec.structs.replace(policy(), mounts=(Mount(target="/x", source="/usr/lib"),))
    members = {
        "first": job("found['x'] = os.path.exists('/x')"),
        "second": job("found['x'] = os.path.exists('/x')", policy=other),
    }
    async with open_runner(slots=2) as runner:
        for _ in range(2):
            found = await runner.run_group(Group(members=members))
            assert [said(one)["x"] for one in found.values()] == [False, True]
            homes = list(runner._known.homes)
            (ground,) = (home for home in homes if home.ground is None)
            (joined,) = (home for home in homes if home.ground is ground)
            victim = (ground if which == "first" else joined).living
            assert victim is not None
            os.kill(victim.pid, signal.SIGKILL)
            await trio.lowlevel.wait_readable(victim.control)  # its zygote has gone with it


async def test_a_kernel_that_cannot_tell_who_listens() -> None:
    """ENOENT without the module of a protocol (sock_diag(7)): nobody waits for what never comes."""
    nobody_has = 254  # for experiments (RFC 3692)
    async with open_runner(slots=1) as runner:
        place = Place(name="a", domain="group", hosts=(("a", "127.0.0.1"),), shared=True)
        seat = Seat(place, None, trio.lowlevel.checkpoint)
        ground = runner._known.ready(Job(argv=("true",)), None, seat).home
        network = await (await ground.netkeeper()).bare(NO_WAY_OUT, place, "member")
        try:
            assert listeners(network, 6) == listeners(network, 17) == set()
            with pytest.raises(LaunchError, match="group: step 4 ask who listens: No such file"):
                listeners(network, nobody_has)
        finally:
            await network.end()
