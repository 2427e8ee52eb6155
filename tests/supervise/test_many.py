"""Many runs, in a row and at once: nothing is left of them (conftest.py looks, too)."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sandboxd.errors import HostError
from sandboxd.job import Job
from sandboxd.policy import Limits, Policy
from sandboxd.supervise.runner import Runner, open_runner
from tests import leftovers
from tests.supervise.variants import hosts, policy, without

SLOW = float(os.environ.get("SANDBOXD_TEST_SLOW", "1"))
SHARE = 10 if SLOW > 1 else 1
"""On an emulated machine a tenth of it."""
IN_A_ROW, AT_ONCE = 1000 // SHARE, 200 // SHARE
PER_LEAF = 6
"""A leaf's directory, cpu.stat, cgroup.events, and three files of pressure; and one leaf more than
there are slots is of a run that is on its way out."""
KINDS = (
    ["true"],
    ["sh", "-c", "sleep 1000 & sleep 1000 & exit 3"],
    ["sh", "-c", "kill -9 $$"],
    ["/no/such/program"],
)
"""Programs that end well, leave others behind, are killed, and never start."""


def limited() -> Policy:
    return policy(Limits(wall_time=60.0, memory=256 << 20, processes=32, cpu_time=20.0))


def left_in(top: str | None) -> int:
    """Cgroups of runs that nobody is in and nobody keeps."""
    return len(list(Path(top).glob("sandboxd-*/*/*"))) if top else 0


async def settled(runner: Runner) -> None:
    while runner._undertaker.is_busy:  # noqa: ASYNC110  the undertaker looks now and then
        await trio.sleep(0.005)


@pytest.mark.time_limit(100.0)
@hosts("nothing", "cgroup")
async def test_in_a_row(host: str) -> None:
    """After the first ones the number of descriptors and cgroups does not grow."""
    own = limited()
    async with open_runner(host=without(host), slots=2) as runner:
        for number in range(20):
            await runner.run(Job(argv=KINDS[number % len(KINDS)], policy=own))
        await settled(runner)
        before = len(set(leftovers.descriptors()))
        cgroups = left_in(os.environ.get("SANDBOXD_CGROUP"))
        for number in range(IN_A_ROW):
            await runner.run(Job(argv=KINDS[number % len(KINDS)], policy=own))
        await settled(runner)
        assert runner.statistics().finished == 20 + IN_A_ROW
        grown = len(set(leftovers.descriptors())) - before
        assert grown <= PER_LEAF * (runner.slots + 1)
        assert left_in(os.environ.get("SANDBOXD_CGROUP")) <= cgroups + 2 * runner.slots


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As many as one may have: a live run takes 6 to 16, and 1024 is what most begin with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 16 * AT_ONCE:
        pytest.skip(f"needs {16 * AT_ONCE} open files: no more than {hard} here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (16 * AT_ONCE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.time_limit(100.0)
@pytest.mark.usefixtures("many_descriptors")
@hosts("nothing", "cgroup")
async def test_at_once(host: str) -> None:
    """All of them live at the same time; then they go together."""
    own = limited()
    async with open_runner(host=without(host), slots=AT_ONCE) as runner:
        ended: list[str] = []

        async def one() -> None:
            job = Job(argv=["sh", "-c", "echo on; read x"], policy=own, stdin=None)
            async with runner.start(job) as run:
                async for event in run.events:
                    if event.type == "stdout":
                        everybody.add(run.id)
                        if len(everybody) == AT_ONCE:
                            all_here.set()
                        break
                await all_here.wait()
                if run.stdin is not None:
                    await run.stdin.aclose()
                async for _ in run.events:
                    pass
                ended.append((await run.wait()).status)

        everybody: set[str] = set()
        all_here = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(one)
        assert len(everybody) == AT_ONCE
        assert set(ended) == {"nonzero_exit"}  # read(1) of sh at the end of its input


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """Enough for a tenant and some sandboxes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(set(leftovers.descriptors())) + 230
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.time_limit(100.0)
@hosts("nothing", "cgroup")
async def test_more_at_once_than_descriptors(host: str, few_descriptors: int) -> None:
    """Each has its result, or an error that says what to do; none hangs, and then all is well."""
    slots = 64
    async with open_runner(host=without(host), slots=slots) as runner:
        ended: list[str] = []

        async def one() -> None:
            job = Job(argv=["sh", "-c", "echo on; exec sleep 0.2"], policy=limited())
            try:
                ended.append((await runner.run(job)).status)
            except HostError as error:
                ended.append(f"{error.missing}: {error.hint}")

        async with trio.open_nursery() as nursery:
            for _ in range(slots):
                nursery.start_soon(one)
        assert len(ended) == slots
        hint = "fewer jobs at once, or raise the limit: ulimit -n"
        assert set(ended) == {"ok", f"open files: {hint}"}
        await settled(runner)
        assert (await runner.run(Job(argv=["true"], policy=limited()))).ok


async def test_no_descriptors_for_a_tenant(few_descriptors: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (90, hard))
    async with open_runner(slots=1) as runner:
        with pytest.raises(HostError, match=r"limit of open files is 90, .*: ulimit -n 1024"):
            await runner.run(Job(argv=["true"], policy=limited()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (few_descriptors, hard))
        assert (await runner.run(Job(argv=["true"], policy=limited()))).ok


async def test_a_new_policy_each_time_does_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandboxd.supervise.known.MOST", 4)
    async with open_runner(slots=1) as many:
        for number in range(12):
            limits = Limits(wall_time=30.0 + number)
            result = await many.run(Job(argv=["true"], policy=policy(limits)))
            assert result.limits["wall_time"].limit == 30.0 + number
            assert len(many._known._kept) <= 4
            assert len(many._known._recent) <= 4
        assert many.statistics().tenants == 1
