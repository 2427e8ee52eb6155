"""The Runner as a caller meets it: live events, kill, errors, one-shot entrances, wrong jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from sandboxd.errors import JobError, PolicyError, SandboxError
from sandboxd.job import Job
from sandboxd.result import Event
from sandboxd.supervise import supervise, vigil
from sandboxd.supervise.oneshot import run as run_one
from sandboxd.supervise.oneshot import run_sync
from sandboxd.supervise.run import Followed, Run
from sandboxd.supervise.runner import Runner, open_runner
from tests.leftovers import STRETCH
from tests.supervise.variants import hosts, policy, without


async def test_events_come_live_and_end_with_the_result() -> None:
    seen: list[Event] = []
    async with open_runner() as runner:
        job = Job(argv=["sh", "-c", "echo one; read x; echo $x"], policy=policy(), stdin=None)
        async with runner.start(job) as run:
            assert run.stdin is not None
            async for event in run.events:
                seen.append(event)
                if event.data == b"one\n":
                    await run.stdin.send_all(b"two\n")
            result = await run.wait()
    assert [event.type for event in seen] == ["start", "stdout", "stdout", "exit"]
    assert [event.seq for event in seen] == [0, 1, 2, 3]
    assert seen[-1].result == result
    assert result.stdout == b"one\ntwo\n"


@pytest.mark.parametrize("reads", [True, False])
async def test_short_runs_are_told_whole_and_in_order(
    reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to a reader who lags behind at the moment something could be told him at once."""
    told: list[bytes] = []
    at_once = Run._at_once

    def tell(run: Run, name: str, data: bytes) -> bool:
        told.append(data)
        return reads and at_once(run, name, data)

    monkeypatch.setattr(Run, "_at_once", tell)
    monkeypatch.setattr(vigil, "LENGTH", 30.0)
    monkeypatch.setattr(supervise, "LENGTH", 30.0)
    job = Job(argv=["/bin/sh", "-c", "echo a; echo b >&2; echo c"], policy=policy())
    async with open_runner() as runner:
        for _ in range(50):
            async with runner.start(job) as run:
                seen = [event async for event in run.events]
            assert [event.seq for event in seen] == list(range(len(seen)))
            out = b"".join(event.data for event in seen if event.type == "stdout")
            error = b"".join(event.data for event in seen if event.type == "stderr")
            assert (out, error, seen[-1].type) == (b"a\nc\n", b"b\n", "exit")
            assert seen[-1].result is not None
            assert seen[-1].result.stdout == out
            assert seen[-1].result.job == run.id
    if runner.host.cpus > 1 and STRETCH == 1:  # where all is slow the watcher is due before
        assert b"a\n" in b"".join(told)


async def test_one_who_follows_hears_all_of_short_runs_and_of_long_ones() -> None:
    async with open_runner() as runner:
        for script in ("echo one; echo two >&2", "echo one; sleep 0.1; echo two >&2"):
            seen: list[Event] = []

            async def tell(event: Event, seen: list[Event] = seen) -> None:
                await trio.lowlevel.checkpoint()
                seen.append(event)

            job = Job(argv=["sh", "-c", script], policy=policy(), id="x")
            result = await runner.follow(job, Followed("x", tell))
            assert [event.seq for event in seen] == [0, 1, 2]
            told = {event.type: event.data for event in seen}
            assert told == {"start": b"", "stdout": b"one\n", "stderr": b"two\n"}
            assert (result.stdout, result.streams["stderr"].data) == (b"one\n", b"two\n")


async def test_who_follows_may_kill() -> None:
    async with open_runner() as runner:

        async def tell(event: Event) -> None:
            await trio.lowlevel.checkpoint()
            if event.type == "stdout":
                run.kill()

        run = Followed("x", tell)
        job = Job(argv=["sh", "-c", "echo; sleep 100"], policy=policy(), id="x")
        assert (await runner.follow(job, run)).status == "cancelled"
        early = Followed("x", tell)
        early.kill()
        assert (await runner.follow(job, early)).status == "cancelled"


async def test_a_slow_reader_stalls_the_job() -> None:
    async with open_runner() as runner:
        job = Job(argv=["sh", "-c", "yes | head -c 50M"], policy=policy(), keep=100)
        async with runner.start(job) as run:
            assert (await run.events.receive()).type == "start"
            total = len((await run.events.receive()).data)  # it runs
            with trio.move_on_after(0.3):
                await trio.sleep_forever()  # nobody reads
            async for event in run.events:
                total += len(event.data)
            result = await run.wait()
    assert total == 50 << 20
    assert result.ok
    assert result.usage.wall_time is not None
    assert result.usage.wall_time > 0.3


async def test_a_reader_that_goes_away_ends_the_job() -> None:
    async with open_runner() as runner:
        job = Job(argv=["yes"], policy=policy())
        async with runner.start(job) as run:
            await run.events.receive()
            run.events.close()
            result = await run.wait()
    assert result.status == "cancelled"


async def test_kill_and_leaving_the_block() -> None:
    async with open_runner() as runner:
        async with runner.start(Job(argv=["sleep", "100"], policy=policy())) as run:
            run.kill()
            async for _ in run.events:
                pass
            assert (await run.wait()).status == "cancelled"
        async with runner.start(Job(argv=["sleep", "100"], policy=policy())) as run:
            await run.events.receive()
        assert runner.statistics().running == 0


@hosts("nothing", "cgroup", "subuid")
async def test_spares_are_used_once_and_refilled(host: str) -> None:
    async with open_runner(host=without(host), spares=2) as runner:
        for number in range(6):
            job = Job(argv=["sh", "-c", "ls /box; echo x > /box/mine; echo $PPID"], policy=policy())
            result = await runner.run(job)
            assert result.stdout == b"1\n", number
            while runner.statistics().spares < 2:
                await trio.lowlevel.checkpoint()


async def test_run_and_run_sync() -> None:
    assert (await run_one(["echo", "hi"], policy=policy())).stdout == b"hi\n"
    in_thread = await trio.to_thread.run_sync(lambda: run_sync(["echo", "hi"], policy=policy()))
    assert in_thread.stdout == b"hi\n"


@pytest.mark.parametrize(
    "wrong",
    [
        {"stdin": "text"},
        {"files": {"a": "text"}},
        {"env": {"A": 1}},
        {"argv": ["echo", 1]},
        {"policy": Path("base")},
        {"collect": "abc"},
        {"argv": "ls -l"},
        {"argv": []},
        {"argv": ["a\0b"]},
        {"files": {"../a": b""}},
        {"files": {"/a": b""}},
        {"env": {"A=B": "c"}},
    ],
    ids=str,
)
def test_a_job_that_makes_no_sense_is_refused_when_it_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(JobError):
        Job(**({"argv": ["true"]} | wrong))


async def test_stdin_none_without_anybody_to_feed_it() -> None:
    async with open_runner() as runner:
        with pytest.raises(JobError, match="start"):
            await runner.run(Job(argv=["cat"], policy=policy(), stdin=None))


async def test_an_error_reaches_who_only_reads_events() -> None:
    async with open_runner() as runner:
        with pytest.raises(PolicyError, match="no-such-policy"):
            await read_events(runner, Job(argv=["true"], policy="no-such-policy"))


async def read_events(runner: Runner, job: Job) -> None:
    async with runner.start(job) as run:
        async for _ in run.events:
            pass


async def test_events_closed_before_anything_happened() -> None:
    async with open_runner() as runner:
        async with runner.start(Job(argv=["sleep", "100"], policy=policy())) as run:
            run.events.close()
            assert (await run.wait()).status == "cancelled"


async def test_killed_while_it_waits_for_a_slot() -> None:
    async with open_runner(slots=1) as runner:
        async with runner.start(Job(argv=["sleep", "100"], policy=policy())) as first:
            await first.events.receive()
            async with runner.start(Job(argv=["true"], policy=policy())) as second:
                await second.events.receive()
                while not runner.statistics().waiting:
                    await trio.lowlevel.checkpoint()
                second.kill()
                assert (await second.wait()).status == "cancelled"


async def test_after_the_end() -> None:
    async with open_runner() as runner:
        async with runner.start(Job(argv=["sleep", "100"], policy=policy())) as run:
            await run.events.receive()
        with pytest.raises(SandboxError, match="left before it ended"):
            await run.wait()
        run.kill()
    with pytest.raises(SandboxError, match="closed"):
        await runner.run(Job(argv=["true"], policy=policy()))


@pytest.mark.parametrize("slots", [0, -1])
async def test_a_runner_without_slots_is_refused(slots: int) -> None:
    with pytest.raises(ValueError, match="slots"):
        await open_runner(slots=slots).__aenter__()
