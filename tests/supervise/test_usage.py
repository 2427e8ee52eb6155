"""What a run uses, told while it lives; and nothing of that for who did not ask."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio

from sandboxd.cgroup.leaf import Counters
from sandboxd.errors import JobError
from sandboxd.job import Job
from sandboxd.policy import Limits
from sandboxd.result import Event, Usage
from sandboxd.supervise.account import without as without_init
from sandboxd.supervise.runner import open_runner
from sandboxd.supervise.sampling import own_cpu
from tests import needs
from tests.supervise.variants import hosts, policy, without

BURNER = "import time\nwhile time.process_time() < 0.3: pass"


async def events_of(host: str, every: float | None, body: str = BURNER) -> list[Event]:
    seen = []
    async with open_runner(host=without(host)) as runner:
        job = Job(argv=["/usr/bin/python3", "-c", body], policy=policy(Limits(wall_time=30.0)))
        async with runner.start(job, usage_every=every) as run:
            seen = [event async for event in run.events]
    return seen


@hosts("nothing", "cgroup")
async def test_usage_events(host: str) -> None:
    events = await events_of(host, 0.03)
    assert [event.seq for event in events] == list(range(len(events)))
    usages = [event.usage for event in events if event.usage is not None]
    assert len(usages) >= 3
    assert [event.type for event in events][-1] == "exit"
    result = events[-1].result
    assert result is not None
    for name in ("cpu_time", "wall_time", "processes_peak", "memory_peak"):
        values = [getattr(usage, name) for usage in usages]
        known = [value for value in values if value is not None]
        assert known == sorted(known), name
    last = usages[-1]
    assert 0 < (last.cpu_time or 0) <= (result.usage.cpu_time or 0)
    # The last look may be at one that is just about to end.
    assert max(usage.memory_current or 0 for usage in usages) > 0
    assert {usage.processes_current for usage in usages} & {1}
    assert result.usage.memory_current is None
    without_one = host == "cgroup" or needs.missing("cgroup")
    assert last.cpu_time_source == ("sampled /proc" if without_one else "cgroup2 cpu.stat")


async def test_nobody_asked() -> None:
    assert {event.type for event in await events_of("nothing", None)} == {"start", "exit"}


async def test_a_slow_reader_misses_some_and_the_order_stays() -> None:
    async with open_runner() as runner:
        job = Job(argv=["sh", "-c", "read x; echo done"], policy=policy(), stdin=None)
        async with runner.start(job, usage_every=0.01) as run:
            # Nobody reads until there are more than the channel holds.
            while run.events.statistics().current_buffer_used < 16:  # noqa: ASYNC110
                await trio.sleep(0.005)
            assert run.stdin is not None
            await run.stdin.aclose()
            events = [event async for event in run.events]
    assert [event.seq for event in events] == list(range(len(events)))
    assert events[-1].result is not None
    assert events[-1].result.stdout == b"done\n"


@pytest.mark.parametrize("every", [0.0, -1.0, 0.001, float("nan"), float("inf")])
async def test_rates_that_make_no_sense(every: float) -> None:
    async with open_runner() as runner:
        with pytest.raises(JobError, match="usage_every"):
            async with runner.start(Job(argv=["true"], policy=policy()), usage_every=every):
                pass


@hosts("nothing", "cgroup")
async def test_usage_on_demand(host: str) -> None:
    async with open_runner(host=without(host)) as runner:
        job = Job(argv=["sh", "-c", "sleep 100 & echo on; wait"], policy=policy())
        async with runner.start(job) as run:
            async for event in run.events:
                if event.type == "stdout":
                    break
            found = run.usage()
    assert isinstance(found, Usage)
    assert (found.wall_time or 0) > 0
    assert found.processes_current == 2
    assert found.cpu_time_source is not None


@pytest.mark.parametrize(
    ("counted", "own", "expected"),
    [
        ((1.0, 0.7, 0.3), 0.25, (0.75, 0.7, 0.05)),
        ((1.0, 0.9, 0.1), 0.25, (0.75, 0.75, 0.0)),  # the two parts are estimates, the sum is not
        ((0.5, 0.1, 0.4), 0.75, (0.0, 0.0, 0.0)),
        ((1.0, None, None), 0.25, (0.75, None, None)),
        ((None, None, None), 0.25, (None, None, None)),
    ],
)
def test_what_init_used_is_no_part_of_a_run(
    counted: tuple[float | None, ...], own: float, expected: tuple[float | None, ...]
) -> None:
    cpu, user, system = counted
    found = without_init(Counters(cpu_time=cpu, cpu_user=user, cpu_system=system), own)
    assert found == pytest.approx(expected)


TELLS = """\
import time
while time.process_time() < 0.1: pass
print(time.process_time(), flush=True)
input()
print(time.process_time(), flush=True)
"""
TICK = 0.02  # the kernel brings a process's counters up to date at every switch and every tick


def test_the_cpu_time_of_a_process_with_one_thread() -> None:
    command = [sys.executable, "-S", "-c", TELLS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        before = float(process.stdout.readline())
        found = own_cpu(process.pid)
        after = float(process.communicate("\n")[0])
    assert before - TICK <= found <= after


def test_a_process_that_is_not_there_used_nothing() -> None:
    assert own_cpu((1 << 22) + 1) == 0.0


@pytest.mark.needs("cgroup", "userns")
async def test_a_run_that_does_nothing_costs_less_than_its_sandbox() -> None:
    """Its CPU time is that of one execve and not of the mounts before it."""
    async with open_runner() as runner:
        job = Job(argv=["true"], policy=policy())
        times = [(await runner.run(job)).usage.cpu_time for _ in range(20)]
        with_failure = await runner.run(Job(argv=["/nonexistent"], policy=policy()))
    assert with_failure.status == "start_failed"
    assert with_failure.usage.cpu_time is not None
    assert with_failure.usage.cpu_time < min(time for time in times if time is not None)
