"""The runner is left, or is used in ever new ways, or has no descriptor: all of it is bounded."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import trio
import trio.testing

from sandboxd.cgroup.leaves import Cgroups, open_cgroups
from sandboxd.errors import HostError, JobError, LaunchError, SandboxError
from sandboxd.host import CgroupSubtree
from sandboxd.job import Job
from sandboxd.policy import Limits
from sandboxd.supervise.builds import Building
from sandboxd.supervise.runner import Runner, open_runner
from tests.supervise.endings import (
    FILES,
    TRUE,
    descriptors_left,
    only,
    refused,
    until,
    with_mount,
    zygote_of,
)
from tests.supervise.members import WAITS
from tests.supervise.test_lifecycle import SLEEPER, children
from tests.supervise.variants import as_found, policy


@pytest.mark.parametrize("step", range(24))
async def test_left_while_another_task_runs_jobs(step: int) -> None:
    """It ends them, wherever they are; each is told, and nothing of them is left."""
    told: list[SandboxError] = []
    jobs = (SLEEPER, FILES, SLEEPER, TRUE)

    async def follow(runner: Runner) -> None:
        async with runner.start(SLEEPER) as run:
            async for _ in run.events:
                pass
            await run.wait()

    async with trio.open_nursery() as nursery:
        async with open_runner(slots=3, host=as_found()) as runner:
            if step % 2:
                await runner.run(TRUE)
            for job in jobs:
                nursery.start_soon(_ended, runner, job, told)
            nursery.start_soon(refused, lambda: follow(runner), told)
            await trio.sleep(step // 2 * 0.002)
        with pytest.raises(SandboxError, match="closed"):
            await runner.run(TRUE)
    assert all("the runner is closed" in str(error) for error in told)
    assert len(told) >= 3


async def _ended(runner: Runner, job: Job, told: list[SandboxError]) -> None:
    try:
        assert (await runner.run(job)).ok
    except SandboxError as error:
        told.append(error)


async def test_left_while_the_zygote_does_not_answer() -> None:
    told: list[SandboxError] = []
    async with trio.open_nursery() as nursery:
        async with open_runner(slots=2) as runner:
            await runner.run(TRUE)
            _, tenant = only(runner)
            os.kill(zygote_of(tenant), signal.SIGSTOP)  # it is killed when it does not go
            for _ in range(3):
                nursery.start_soon(refused, lambda: runner.run(TRUE), told)
            await trio.testing.wait_all_tasks_blocked()
    assert len(told) == 3


async def test_a_build_that_ends_when_its_runner_was_left(tmp_path: Path) -> None:
    class Store:
        def hold(self, _: str) -> int:
            return os.open(tmp_path, os.O_RDONLY)

    building = Building()
    building.close()
    building.hold(Store(), "key")  # type: ignore[arg-type]


async def test_each_policy_has_another_spare() -> None:
    """Those that were used last have some ready, and no more: each is a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sandboxd.supervise.known.MOST_AHEAD", 3)
        patch.setattr("sandboxd.supervise.known.MOST", 6)
        async with open_runner(slots=1, spares=1) as runner:
            for number in range(12):
                limits = Limits(wall_time=30.0 + number)
                await runner.run(Job(argv=["true"], policy=policy(limits)))
                await until(lambda: not any(one.refilling for one in runner._known.all()))
                assert len(list(runner._known.all())) <= 6
            await until(lambda: runner.statistics().spares == 3)
            living = [one.policy.limits.wall_time for one in runner._known.all() if one.spares]
            assert living == [39.0, 40.0, 41.0]
            (zygote,) = children(next(iter(runner._known.homes)).living.pid)  # type: ignore[union-attr]
            await until(lambda: len(children(zygote)) == 3)


async def test_each_policy_has_another_root() -> None:
    """What is remembered of tenants that nobody will ask for again is bounded, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sandboxd.supervise.known.MOST", 3)
        async with open_runner(slots=1) as runner:
            for number in range(8):
                own = with_mount(f"/mnt{number}")
                assert (await runner.run(Job(argv=["true"], policy=own))).ok
            await until(lambda: len(list(runner._known.homes)) <= 3)
            await until(lambda: runner.statistics().tenants <= 3)


async def test_what_was_made_ahead_has_the_descriptors_that_are_needed() -> None:
    async with open_runner(slots=1, spares=2) as runner:
        await runner.run(TRUE)
        kept, _ = only(runner)
        await until(lambda: len(kept.spares) == 2 and not kept.refilling)
        with descriptors_left(0), pytest.raises(HostError, match="open files"):
            await runner.run(Job(argv=["true"], policy=policy(Limits(wall_time=7.0))))
        await until(lambda: not kept.spares)
        assert (await runner.run(TRUE)).ok


async def test_left_while_an_artifact_is_opened() -> None:
    """By another task: it is told, and what was opened for it is closed."""
    job = Job(argv=["sh", "-c", "head -c 100000 /dev/zero > big"], policy=policy(),
              collect=["*"], collect_to="stream")  # fmt: skip
    told: list[SandboxError] = []
    async with open_runner(slots=1) as runner, trio.open_nursery() as nursery:
        async with runner.start(job) as run:
            async for _ in run.events:
                pass
            assert (await run.wait()).ok
            porter = await only(runner)[0].home.porter()
            (process,) = porter._processes
            os.kill(process.process.pid, signal.SIGSTOP)
            nursery.start_soon(refused, lambda: anext(aiter(run.artifacts())), told)
            await trio.testing.wait_all_tasks_blocked()
        os.kill(process.process.pid, signal.SIGCONT)
        await until(lambda: told)
    assert "the run was left" in str(told[0])


@pytest.mark.needs("cgroup")
async def test_paused_where_no_descriptor_is_left() -> None:
    """Its clocks run on, for it does."""
    job = Job(argv=WAITS, policy=policy(Limits(wall_time=1.0)))
    async with open_runner(slots=1) as runner, runner.start(job) as run:
        await until(lambda: run._control)
        with descriptors_left(0), pytest.raises(HostError, match="open files"):
            await run.pause()
        with trio.fail_after(20):
            async for _ in run.events:
                pass
        assert (await run.wait()).status == "wall_time_limit"


@pytest.mark.needs("cgroup")
async def test_killed_while_paused_where_no_descriptor_is_left() -> None:
    async with open_runner(slots=1) as runner, runner.start(SLEEPER) as run:
        await until(lambda: run._control)
        await run.pause()
        with descriptors_left(0):
            run.kill()
        with trio.fail_after(20):
            async for _ in run.events:
                pass
        assert (await run.wait()).status == "cancelled"


@pytest.mark.needs("cgroup")
async def test_no_descriptor_for_a_leaf() -> None:
    async with open_cgroups(as_found().cgroup) as cgroups:
        assert cgroups is not None
        cgroups.give_back(cgroups.take({}))
        cgroups.shrink()
        before = set(cgroups.top.glob("*/*/"))  # one that counts memory is removed later
        with descriptors_left(0), pytest.raises(OSError, match="Too many open files"):
            cgroups.take({})
        assert set(cgroups.top.glob("*/*/")) == before


def test_no_descriptor_for_the_place_of_leaves(tmp_path: Path) -> None:
    """The next one makes it."""
    cgroups = Cgroups(tmp_path, CgroupSubtree(path=str(tmp_path), controllers=frozenset({"pids"})))
    with descriptors_left(0), pytest.raises(OSError, match="Too many open files"):
        cgroups.take({})
    cgroups.take({}).close()


async def test_stdin_that_is_no_file(tmp_path: Path) -> None:
    """A FIFO would be waited for by everybody, and some devices have no end."""
    os.mkfifo(tmp_path / "fifo")
    async with open_runner(slots=1) as runner:
        for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
            with pytest.raises(JobError, match="no regular file"):
                await runner.run(Job(argv=["cat"], policy=policy(), stdin=path))


async def test_no_room_for_stdin() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with open_runner(slots=1) as runner:
        await runner.run(TRUE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            with pytest.raises(LaunchError, match="File too large"):
                await runner.run(Job(argv=["true"], policy=policy(), stdin=bytes(2 << 20)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def test_no_process_for_a_tenant() -> None:
    """It is told as what it is, with the step and errno."""
    if os.geteuid() == 0:
        pytest.skip("the limit holds for an ordinary user only")
    limits = resource.getrlimit(resource.RLIMIT_NPROC)
    async with open_runner(slots=1) as runner:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, limits[1]))
        try:
            with pytest.raises(LaunchError, match="start its zygote") as caught:
                await runner.run(TRUE)
        finally:
            resource.setrlimit(resource.RLIMIT_NPROC, limits)
        assert (caught.value.stage, caught.value.errno) == ("tenant", 11)
        assert (await runner.run(TRUE)).ok
