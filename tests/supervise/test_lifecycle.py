"""Whatever dies, whenever: the caller learns it, and nothing is left (conftest looks each time)."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from sandboxd.errors import LaunchError
from sandboxd.job import Job
from sandboxd.supervise.runner import Runner, open_runner
from tests.supervise.variants import hosts, policy, without

SLEEPER = Job(argv=["sleep", "1000"], policy=policy())
PATIENCE = 30_000  # milliseconds


def children(pid: int) -> list[int]:
    """Of its first thread; none of a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in text.split()]


def descendants(pid: int) -> list[int]:
    found = children(pid)
    for child in list(found):
        found += descendants(child)
    return found


def tenant_of(runner: Runner) -> int:
    """The process we started for the runner's only tenant; its child is the zygote."""
    (home,) = runner._known.homes
    assert home.living is not None
    return home.living.pid


@contextmanager
def all_end(pids: list[int]) -> Iterator[None]:
    """The body ends all of these processes, at the latest PATIENCE after it."""
    pidfds = []
    for pid in pids:
        with suppress(ProcessLookupError):  # one that was on its way already
            pidfds.append(os.pidfd_open(pid))
    try:
        yield
        for pidfd in pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(PATIENCE), "a process is still there"
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def command_line(pid: int) -> bytes:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


async def started(runner: Runner) -> int:
    """Wait until the sleeper runs; the pid of its init."""
    while True:
        await trio.sleep(0.001)
        if not runner.statistics().tenants:
            continue
        for init in (pid for zygote in children(tenant_of(runner)) for pid in children(zygote)):
            if any(b"sleep" in command_line(pid) for pid in children(init)):
                return init


@hosts("nothing", "subuid", "machine")
async def test_cancelled_at_any_point(host: str) -> None:
    async with open_runner(host=without(host), slots=4) as runner:
        await runner.run(Job(argv=["true"], policy=policy()))
        for step in range(60):
            with trio.move_on_after(step * 0.0002):
                job = Job(
                    argv=["cat"], policy=policy(), stdin=b"x", files={"a": b""}, collect=["a"]
                )
                await runner.run(job)
        assert (await runner.run(Job(argv=["echo", "hi"], policy=policy()))).stdout == b"hi\n"


@pytest.mark.parametrize("step", range(0, 30, 3))
async def test_cancelled_while_the_tenant_starts(step: int) -> None:
    with trio.move_on_after(step * 0.001):
        async with open_runner() as runner:
            await runner.run(SLEEPER)


@hosts("nothing", "subuid", "cgroup", "machine")
async def test_the_zygote_is_killed(host: str) -> None:
    async with open_runner(host=without(host)) as runner:
        async with trio.open_nursery() as nursery:
            caught: list[LaunchError] = []

            async def sleeper() -> None:
                try:
                    await runner.run(SLEEPER)
                except LaunchError as error:
                    caught.append(error)

            nursery.start_soon(sleeper)
            init = await started(runner)
            (zygote,) = children(tenant_of(runner))
            with all_end([zygote, init, *descendants(init)]):
                os.kill(zygote, signal.SIGKILL)
        assert "killed from outside" in str(caught[0])
        assert (await runner.run(Job(argv=["echo", "again"], policy=policy()))).stdout == b"again\n"


async def test_init_is_killed() -> None:
    async with open_runner() as runner:
        with pytest.RaisesGroup(LaunchError):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(runner.run, SLEEPER)
                init = await started(runner)
                with all_end([init, *descendants(init)]):
                    os.kill(init, signal.SIGKILL)
        assert (await runner.run(Job(argv=["true"], policy=policy()))).ok


async def test_spares_die_with_their_zygote_and_are_not_used() -> None:
    async with open_runner(spares=2) as runner:
        await runner.run(Job(argv=["true"], policy=policy()))
        # They are refilled in the background.
        while runner.statistics().spares < 2:  # noqa: ASYNC110
            await trio.sleep(0.001)
        (zygote,) = children(tenant_of(runner))
        with all_end([zygote, *descendants(zygote)]):
            os.kill(zygote, signal.SIGKILL)
        assert (await runner.run(Job(argv=["true"], policy=policy()))).ok


@hosts("nothing", "subuid")
async def test_what_was_left_outlives_its_tenant(host: str) -> None:
    """The next one has the same ids, and so the same rights (capabilities(7), user namespaces)."""
    write = "umask 077; mkdir d; echo left > a; head -c 50000 /dev/zero > d/b"
    job = Job(argv=["sh", "-c", write], policy=policy(), collect=["a", "d/*"], collect_to="stream")
    async with open_runner(host=without(host)) as runner, runner.start(job) as run:
        async for _ in run.events:
            pass
        (zygote,) = children(tenant_of(runner))
        with all_end([zygote, *descendants(zygote)]):
            os.kill(zygote, signal.SIGKILL)
        await runner.run(Job(argv=["true"], policy=policy()))
        assert [await one.read(5) async for one in run.artifacts()] == [b"left\n", bytes(5)]


async def test_a_tenant_ends_while_a_network_is_made_ahead() -> None:
    async with open_runner(slots=1) as runner:
        await runner.run(Job(argv=["true"], policy=policy()))
        (home,) = runner._known.homes
        tenant = home.living
        assert tenant is not None
        with pytest.RaisesGroup(LaunchError):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tenant.refill_networks, 1000)
                await trio.testing.wait_all_tasks_blocked()
                tenant.close_networks()  # as at its end, while one is being made
        assert tenant.networks_ahead == 0


SUPERVISOR = """
import sys, trio
from sandboxd.job import Job
from sandboxd.supervise.runner import open_runner
from tests.supervise.variants import policy, without

async def main():
    async with open_runner(host=without(sys.argv[1]), slots=8, spares=3) as runner:
        await runner.run(Job(argv=["true"], policy=policy()))
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                job = Job(argv=["sh", "-c", "trap '' TERM; sleep 1000 & setsid sleep 1000"],
                          policy=policy())
                nursery.start_soon(runner.run, job)
            while runner.statistics().running < 6 or runner.statistics().spares < 3:
                await trio.sleep(0.001)
            print("ready", flush=True)

trio.run(main)
"""


@hosts("nothing", "subuid", "cgroup", "machine")
def test_the_supervisor_is_killed(host: str) -> None:
    command = [sys.executable, "-c", SUPERVISOR, host]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        everything = descendants(process.pid)
        assert len(everything) > 10
        with all_end(everything):
            process.kill()
            process.wait()

    # Its empty cgroups are all that stays, and the next runner sweeps them.
    async def next_one() -> None:
        async with open_runner():
            pass

    trio.run(next_one)


async def test_hundreds_of_jobs_leave_no_descriptor() -> None:
    async with open_runner(slots=8) as runner:
        counts = []
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for _ in range(150):
                    nursery.start_soon(runner.run, Job(argv=["true"], policy=policy()))
            counts.append(len(os.listdir("/proc/self/fd")))
        # What is pooled, or dying, is bounded by the slots: a leak of one a job would be 300.
        assert counts[2] <= counts[0] + 64, counts
