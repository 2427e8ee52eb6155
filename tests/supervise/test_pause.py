"""A run that is frozen: it stands still, its clocks do too, and it can be killed all the same."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import trio

from sandboxd.errors import HostError, SandboxError
from sandboxd.job import Job
from sandboxd.policy import Limits
from sandboxd.supervise.run import Run
from sandboxd.supervise.runner import open_runner
from tests.supervise.variants import as_found, policy, without

SLOW = float(os.environ.get("SANDBOXD_TEST_SLOW", "1"))
TICKING = (
    "import time\nprint('on', flush=True)\nwhile True: time.sleep(0.001); print('.', flush=True)"
)


def ticking(limits: Limits) -> Job:
    return Job(argv=["/usr/bin/python3", "-c", TICKING], policy=policy(limits))


async def first_words(run: Run) -> None:
    async for event in run.events:
        if event.type == "stdout":
            return


async def drain(run: Run) -> int:
    """How many bytes come, until nothing does for a while."""
    total = 0
    with trio.move_on_after(0.2):
        async for event in run.events:
            total += len(event.data)
    return total


def frozen(top: Path) -> int:
    """How many cgroups of runs stand still."""
    events = (path.read_text() for path in top.glob("sandboxd-*/*/*/cgroup.events"))
    return sum("frozen 1" in text for text in events)


@pytest.mark.needs("cgroup")
async def test_paused_and_resumed(cgroup_top: Path) -> None:
    limits = Limits(wall_time=30.0)
    async with open_runner() as runner, runner.start(ticking(limits)) as run:
        await first_words(run)
        await run.pause()
        assert frozen(cgroup_top) == 1
        await drain(run)
        cpu = run.usage().cpu_time
        assert await drain(run) == 0
        assert run.usage().cpu_time == cpu
        run.resume()
        await first_words(run)
        run.kill()
        await drain(run)
        assert (await run.wait()).status == "cancelled"


@pytest.mark.needs("cgroup")
async def test_its_clocks_stop() -> None:
    """Neither the wall clock nor the idle limit is reached in a pause, and both go on after it."""
    limit = 0.6 + 0.1 * SLOW
    limits = Limits(wall_time=limit, idle_time=0.8 * limit)
    async with open_runner() as runner, runner.start(ticking(limits)) as run:
        await first_words(run)
        await run.pause()
        began = trio.current_time()
        with trio.move_on_after(1.7 * limit):
            while True:
                await run.events.receive()
        before = run.usage().wall_time
        assert before is not None
        assert before < limit
        run.resume()
        paused = trio.current_time() - began
        async for _ in run.events:
            pass
        result = await run.wait()
    assert result.status == "wall_time_limit"
    wall = result.usage.wall_time
    assert wall is not None
    assert wall > 0.9 * limit
    assert trio.current_time() - began > paused
    assert (result.usage.idle_longest or 0) < 0.8 * limit


@pytest.mark.needs("cgroup")
@pytest.mark.parametrize("how", ["kill", "leave"])
async def test_killed_while_paused(how: str) -> None:
    async with open_runner() as runner:
        async with runner.start(ticking(Limits(wall_time=30.0))) as run:
            await first_words(run)
            await run.pause()
            if how == "kill":
                run.kill()
                async for _ in run.events:
                    pass
                result = await run.wait()
                assert result.status == "cancelled"
                assert result.usage.context_switches_voluntary is not None, "init reported"
        assert (await runner.run(Job(argv=["true"], policy=policy()))).ok


@pytest.mark.needs("cgroup")
async def test_paused_twice_resumed_twice() -> None:
    async with open_runner() as runner, runner.start(ticking(Limits(wall_time=30.0))) as run:
        await first_words(run)
        for _ in range(2):
            await run.pause()
            await run.pause()
            run.resume()
            run.resume()
        await first_words(run)


async def test_without_a_cgroup_the_error_names_the_fix() -> None:
    host = msgspec.structs.replace(as_found(), cgroup=None, cgroup_why_not="left out by the test")
    async with open_runner(host=host) as runner, runner.start(ticking(Limits())) as run:
        await first_words(run)
        with pytest.raises(HostError, match="cgroup") as caught:
            await run.pause()
        assert "doctor" in caught.value.hint
        run.resume()


@pytest.mark.parametrize("host", ["nothing", "cgroup"])
async def test_not_before_it_runs_and_not_after_its_end(host: str) -> None:
    async with open_runner(host=without(host), slots=1) as runner:
        async with runner.start(ticking(Limits(wall_time=30.0))) as first:
            await first_words(first)
            async with runner.start(Job(argv=["true"], policy=policy())) as run:
                for use in (run.usage, run.resume):
                    with pytest.raises(SandboxError, match="not started"):
                        use()
                first.kill()
                await drain(first)
                async for _ in run.events:
                    pass
                await run.wait()
                with pytest.raises(SandboxError, match="over"):
                    run.usage()
