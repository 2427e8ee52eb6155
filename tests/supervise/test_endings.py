"""What serves a run ends while somebody waits for it: nobody hangs, and nothing is left.

Each test brings about one such moment, by stopping a process or by ending something by hand.
"""

from __future__ import annotations

import array
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trio
import trio.testing

from sandboxd.errors import HostError, LaunchError, SandboxError
from sandboxd.group import Group, Member
from sandboxd.job import Job
from sandboxd.messages import CloneReply
from sandboxd.supervise import sandboxes
from sandboxd.supervise.groups import NO_WAY_OUT
from sandboxd.supervise.homes import Home
from sandboxd.supervise.runner import Runner, open_runner
from sandboxd.supervise.tenants import Tenant
from tests.supervise.endings import (
    FILES,
    TRUE,
    descriptors_left,
    only,
    refused,
    stopped,
    until,
    with_mount,
    with_way_out,
    zygote_of,
)
from tests.supervise.members import WAITS, waiting
from tests.supervise.test_lifecycle import all_end, children, descendants
from tests.supervise.variants import hosts, policy, without


async def test_killed_while_files_are_on_their_way_in() -> None:
    async with open_runner(slots=1) as runner:
        await runner.run(FILES)
        kept, tenant = only(runner)
        porter = await kept.home.porter()
        (process,) = porter._processes
        told: list[SandboxError] = []
        async with trio.open_nursery() as nursery:
            with stopped(process.process.pid):
                nursery.start_soon(refused, lambda: runner.run(FILES), told)
                await until(lambda: process.owes)
                zygote = zygote_of(tenant)
                with all_end([zygote, *descendants(zygote)]):
                    os.kill(zygote, signal.SIGKILL)
        assert isinstance(told[0], LaunchError)
        assert (await runner.run(FILES)).ok


async def test_killed_before_its_init_has_read_the_script() -> None:
    async with open_runner(slots=1, spares=1) as runner:
        await runner.run(TRUE)
        kept, tenant = only(runner)
        await until(lambda: kept.spares and not kept.refilling)
        told: list[SandboxError] = []
        zygote = zygote_of(tenant)
        async with trio.open_nursery() as nursery:
            with stopped(kept.spares[0].pid()):
                nursery.start_soon(refused, lambda: runner.run(FILES), told)
                await trio.testing.wait_all_tasks_blocked()
                with all_end([zygote, *descendants(zygote)]):
                    os.kill(zygote, signal.SIGKILL)
        assert isinstance(told[0], LaunchError)
        assert (await runner.run(FILES)).ok


async def test_a_tenant_that_was_left_meanwhile() -> None:
    """Who had it before is told that it is gone, and so tries with a new one."""
    async with open_runner(slots=1) as runner:
        await runner.run(TRUE)
        kept, tenant = only(runner)
        await kept.home.leave()
        for call in (
            lambda: sandboxes.make(tenant, kept.prepared, runner._cgroups, None),
            tenant.take_network,
        ):
            told: list[SandboxError] = []
            await refused(call, told)
            assert isinstance(told[0], LaunchError)
            assert told[0].stage == "tenant"
        with pytest.raises(LaunchError):
            tenant.user_namespace()
        tenant.dead = False
        tenant.look()
        assert tenant.dead


async def test_left_while_somebody_waits_for_its_porter() -> None:
    """A home is left by who finds its tenant dead: who waits for his turn there gets a new one."""
    async with open_runner(slots=2) as runner, trio.open_nursery() as nursery:
        await runner.run(TRUE)
        kept, _ = only(runner)
        found = []

        async def ask() -> None:
            found.append(await kept.home.porter())

        async with kept.home._lock:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            await kept.home._leave()
        await until(lambda: found)
        assert found == [kept.home._porter]
        assert (await runner.run(FILES)).ok


async def test_left_while_its_zygote_hears_nothing() -> None:
    """Requests wait in its socket, and some for room in there."""
    async with open_runner(slots=1) as runner, trio.open_nursery() as nursery:
        await runner.run(TRUE)
        kept, tenant = only(runner)
        await until(lambda: not kept.refilling)
        tenant.control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)
        told: list[SandboxError] = []
        with stopped(zygote_of(tenant)):
            for _ in range(60):
                nursery.start_soon(refused, tenant._make_network, told)
            await trio.testing.wait_all_tasks_blocked()
            assert tenant._sending.locked()
            os.kill(zygote_of(tenant), signal.SIGKILL)
            await kept.home.leave()
            await until(lambda: len(told) == 60)
        assert {error.stage for error in told if isinstance(error, LaunchError)} == {"tenant"}


async def test_cancelled_while_the_zygote_does_not_answer() -> None:
    async with open_runner(slots=1) as runner:
        await runner.run(TRUE)
        kept, tenant = only(runner)
        await until(lambda: not kept.refilling)
        with stopped(zygote_of(tenant)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tenant.refill_networks, 1000)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert (await runner.run(TRUE)).ok


async def test_answered_when_nobody_waits_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox that was given up is ended as soon as somebody can."""
    monkeypatch.setattr(sandboxes, "DEAD_TIMEOUT", 0.01)
    async with open_runner(slots=1) as runner:
        for _ in range(2):  # for who runs one job only nothing is made ahead
            await runner.run(TRUE)
        kept, tenant = only(runner)
        await until(lambda: not kept.refilling)
        before = set(os.listdir("/proc/self/fd"))
        with stopped(zygote_of(tenant)):
            box = await sandboxes.make(tenant, kept.prepared, runner._cgroups, None)
            assert not await box.end()
        assert (await runner.run(TRUE)).ok
        await until(lambda: not runner._undertaker.is_busy and not kept.refilling)
        assert not children(zygote_of(tenant))
        # A network ahead; and those of a leaf, where there is a cgroup.
        assert len(set(os.listdir("/proc/self/fd")) - before) <= 8


async def test_an_answer_without_its_descriptor() -> None:
    """At the limit a thread may take the place that was kept: the kernel drops it (unix(7))."""
    async with open_runner(slots=1) as runner:
        await runner.run(TRUE)
        kept, living = only(runner)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            tenant = Tenant(living.compiled, living.host, ours, living._doorbell, living.pid)
            asked = await tenant.clone(kept.prepared.compiled.setup, b"", [])
            theirs.send(CloneReply.FORM.pack(1234))
            with pytest.raises(LaunchError, match="Too many open files"):
                await asked.wait()
            assert tenant.dead


@contextmanager
def in_flight(count: int) -> Iterator[None]:
    """So many descriptors of this user are on their way in sockets."""
    at_once = 250
    with ExitStack() as stack:
        for _ in range(-(-count // at_once)):
            ours, theirs = map(stack.enter_context, socket.socketpair())
            rights = array.array("i", [theirs.fileno()] * at_once)
            ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        yield


@hosts("nothing", "subuid")
async def test_too_many_descriptors_on_their_way(host: str) -> None:
    """It is said, and ends nobody: neither the zygote nor the jobs that it has."""
    if os.geteuid() == 0:
        pytest.skip("the limit holds for an ordinary user only")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with open_runner(host=without(host), slots=2) as runner:
        await runner.run(TRUE)
        kept, tenant = only(runner)
        async with runner.start(Job(argv=WAITS, policy=policy())) as run:
            assert (await anext(aiter(run.events))).type == "start"
            assert (await run.events.receive()).data == b"up\n"
            few = max(map(int, os.listdir("/proc/self/fd"))) + 100
            told: list[SandboxError] = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
            try:
                with in_flight(few + 1):
                    await refused(lambda: runner.run(TRUE), told)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert isinstance(told[0], HostError)
            assert told[0].missing == "open files"
            assert (await runner.run(TRUE)).ok
            assert kept.home.living is tenant
            run.kill()
            async for _ in run.events:
                pass
            assert (await run.wait()).status == "cancelled"


async def networks_of(runner: Runner) -> tuple[Home, int]:
    """The home whose netkeeper has a group's networks, and that netkeeper's pid."""
    home = next(one for one in runner._known.homes if one.living_netkeeper is not None)
    assert home.living_netkeeper is not None
    return home, home.living_netkeeper._process.pid


async def test_a_group_keeps_its_ground() -> None:
    """Its networks belong to the first member's tenant, also when that member has ended."""
    members = {
        "first": Member(job=TRUE),
        "second": Member(job=Job(argv=WAITS, policy=with_mount("/mnt"))),
    }
    async with open_runner(slots=2) as runner:
        async with runner.start_group(Group(members=members, stop="never")) as live:
            async for _ in live.runs["first"].events:
                pass
            home, _ = await networks_of(runner)
            await home.retire()
            assert home.living is not None
            live.kill()
        await home.retire()
        assert home.living is None


async def test_a_netkeeper_that_was_lost_leaves_nothing() -> None:
    async with open_runner(slots=2) as runner:
        await runner.run_group(Group(members={"one": Member(job=TRUE)}))
        home, pid = await networks_of(runner)
        lost = home.living_netkeeper
        assert lost is not None
        with all_end([pid]):
            os.kill(pid, signal.SIGKILL)
        again = await home.netkeeper()
        assert again is not lost
        assert lost._link.fileno() < 0
        assert (await runner.run_group(Group(members={"one": Member(job=TRUE)})))["one"].ok


@pytest.mark.needs("tun", "slirp4netns")
async def test_a_spare_that_has_lost_its_way_out_is_not_used() -> None:
    job = Job(argv=["true"], policy=with_way_out())
    async with open_runner(slots=1, spares=1) as runner:
        await runner.run(job)
        kept, _ = only(runner)
        await until(lambda: kept.spares and not kept.refilling)
        way_out = kept.spares[0].way_out
        assert way_out is not None
        way_out.kill()
        await until(lambda: not way_out.is_alive())
        assert (await runner.run(job)).ok


async def test_no_descriptors_for_a_network() -> None:
    """That is said; the netkeeper lives on, and the group that it has."""
    async with open_runner(slots=4) as runner, runner.start_group(waiting("a", "b")) as live:
        for run in live.runs.values():
            await until(lambda run=run: run._control)  # type: ignore[misc]
        home, _ = await networks_of(runner)
        keeper = home.living_netkeeper
        assert keeper is not None
        with descriptors_left(3), pytest.raises(HostError, match="open files"):
            await keeper.bare(NO_WAY_OUT)
        assert not keeper.dead
        await (await keeper.bare(NO_WAY_OUT)).end()
        assert await home.netkeeper() is keeper
