"""Jobs joined by pipes: who talks to whom, who ends first, and what is told of it."""

from __future__ import annotations

import hashlib

import pytest
import trio

from sandboxd.errors import JobError
from sandboxd.job import Job, Pipe, Terminal
from sandboxd.policy import Limits
from sandboxd.result import Result
from sandboxd.supervise.runner import open_runner
from tests.supervise.variants import EVERY, policy, without

RELAYED = pytest.mark.parametrize("relay", [False, True])

GUESSER = """
low, high = 0, 1000
while low < high:
    middle = (low + high) // 2
    print(middle, flush=True)
    answer = input()
    if answer == "yes":
        break
    low, high = (middle + 1, high) if answer == "more" else (low, middle)
"""
JUDGE = """
import sys
for line in sys.stdin:
    guess = int(line)
    print("yes" if guess == 613 else "more" if guess < 613 else "less", flush=True)
    if guess == 613:
        sys.exit(42)
"""


def job(*argv: str, **more: object) -> Job:
    limits = Limits(wall_time=20.0)
    return Job(**{"argv": argv, "policy": policy(limits), **more})  # type: ignore[arg-type]


def python(program: str, **more: object) -> Job:
    return job("python3", "-c", program, **more)


async def run(jobs: list[Job], *pipes: Pipe, slots: int = 2, host: str = "nothing") -> list[Result]:
    async with open_runner(slots=slots, host=without(host)) as runner:
        return await runner.run_pipeline(jobs, pipes)


def both_ways(relay: bool) -> tuple[Pipe, Pipe]:
    return Pipe(writer=0, reader=1, relay=relay), Pipe(writer=1, reader=0, relay=relay)


@EVERY
@RELAYED
async def test_two_play_a_game(host: str, relay: bool) -> None:
    guesser, judge = await run([python(GUESSER), python(JUDGE)], *both_ways(relay), host=host)
    assert (guesser.status, judge.status, judge.exit_code) == ("ok", "nonzero_exit", 42)
    if relay:
        said = guesser.stdout.split()
        assert said[0] == b"500"
        assert said[-1] == b"613"
        assert judge.stdout.endswith(b"yes\n")
        assert guesser.streams["stdout"].bytes == len(guesser.stdout)
    else:  # nobody saw it
        assert set(guesser.streams) == {"stderr"}


@RELAYED
async def test_one_slot_is_enough_for_two(relay: bool) -> None:
    guesser, _ = await run([python(GUESSER), python(JUDGE)], *both_ways(relay), slots=1)
    assert guesser.ok


@RELAYED
async def test_all_of_it_arrives(relay: bool) -> None:
    size = 3_000_017
    writer = job("sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x")
    pipe = Pipe(writer=0, reader=1, relay=relay)
    sent, counted = await run([writer, job("wc", "-c")], pipe)
    assert int(counted.stdout) == size
    if relay:
        seen = sent.streams["stdout"]
        assert seen.sha256 == hashlib.sha256(b"x" * size).hexdigest()
        assert (seen.bytes, seen.truncated) == (size, True)
        assert seen.kept <= 1 << 20


async def test_who_writes_to_nobody_gets_sigpipe_but_not_through_a_relay() -> None:
    writer = job("sh", "-c", "yes | head -c 1000000")
    reader = job("head", "-c", "1")
    direct, _ = await run([job("yes"), reader], Pipe(writer=0, reader=1))
    assert direct.signal is not None
    assert direct.signal.name == "SIGPIPE"
    relayed, _ = await run([writer, reader], Pipe(writer=0, reader=1, relay=True))
    assert relayed.ok
    assert relayed.streams["stdout"].bytes == 1_000_000


@RELAYED
async def test_closing_a_stream_is_its_end_though_the_program_goes_on(relay: bool) -> None:
    closes = python(
        "import os, sys; os.write(1, b'x'); os.close(1); sys.exit(0 if input() == 'seen' else 9)"
    )
    waits = python("import sys; sys.stdin.read(); print('seen')")
    found = await run([closes, waits], *both_ways(relay))
    assert [one.status for one in found] == ["ok", "ok"]


async def test_stderr_may_be_what_is_joined() -> None:
    writer = job("sh", "-c", "echo told >&2; echo own")
    told, heard = await run([writer, job("cat")], Pipe(writer=0, reader=1, stream="stderr"))
    assert (told.stdout, heard.stdout) == (b"own\n", b"told\n")


async def test_each_has_its_own_limits() -> None:
    slow = job("sleep", "30", policy=policy(Limits(wall_time=0.3)))
    limited, other = await run([slow, job("cat")], Pipe(writer=0, reader=1))
    assert (limited.status, other.status) == ("wall_time_limit", "ok")


async def test_a_program_that_is_not_there_is_a_result() -> None:
    missing, other = await run([job("no-such-program"), job("cat")], Pipe(writer=0, reader=1))
    assert (missing.status, other.status) == ("start_failed", "ok")


async def test_pipelines_and_others_share_the_slots_without_waiting_for_each_other() -> None:
    async with open_runner(slots=2) as runner:
        ended = list[str]()

        async def pipeline() -> None:
            found = await runner.run_pipeline([python(GUESSER), python(JUDGE)], both_ways(False))
            ended.extend(one.status for one in found)

        async def single() -> None:
            ended.append((await runner.run(job("true"))).status)

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(pipeline)
                nursery.start_soon(single)
        assert runner.statistics().running == 0
    assert sorted(ended) == ["nonzero_exit"] * 6 + ["ok"] * 12


@RELAYED
async def test_cancelled_it_leaves_nothing(relay: bool) -> None:
    async with open_runner(slots=2) as runner:
        with trio.move_on_after(0.5) as scope:
            await runner.run_pipeline([job("sleep", "60"), job("cat")], both_ways(relay))
        assert scope.cancelled_caught
        assert runner.statistics().running == 0


async def test_followed_and_killed() -> None:
    async with open_runner(slots=2) as runner:
        talks = job("sh", "-c", "echo ready >&2; exec cat")
        async with runner.start_pipeline([talks, talks], both_ways(False)) as joined:
            first, second = joined.runs
            for run in (first, second):
                async for event in run.events:
                    if event.data:
                        assert event.data == b"ready\n"
                        break
            joined.kill()
            async with trio.open_nursery() as nursery:
                for run in joined.runs:
                    nursery.start_soon(_drain, run.events)
                found = await joined.wait()
        assert [one.status for one in found] == ["cancelled", "cancelled"]


async def _drain(events: trio.MemoryReceiveChannel[object]) -> None:
    async for _ in events:
        pass


async def test_a_held_end_is_seen_when_it_is_passed_and_not_before() -> None:
    says = job("sh", "-c", "printf told; exit 3")
    hears = python("import sys; print('>', end='', file=sys.stderr, flush=True);"
                   " print(len(sys.stdin.read()))")  # fmt: skip
    pipe = Pipe(writer=0, reader=1, relay=True, hold=True)
    async with open_runner(slots=2) as runner:
        async with runner.start_pipeline([says, hears], [pipe]) as joined:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_drain, joined.runs[0].events)
                await joined.wait_end(0)
                assert (await joined.result(0)).exit_code == 3
                async for event in joined.runs[1].events:
                    if event.data:
                        break  # it reads: what was said, and not the end of it
                nursery.start_soon(_drain, joined.runs[1].events)
                with trio.move_on_after(0.3):
                    await joined.runs[1].wait()
                    pytest.fail("it saw an end that was held")
                assert joined.unread(0) == 0
                joined.pass_end(0)
                assert (await joined.result(1)).stdout == b"4\n"


async def test_what_nobody_has_read_is_counted() -> None:
    says, sleeps = job("printf", "told"), job("sleep", "60")
    pipe = Pipe(writer=0, reader=1, relay=True, hold=True)
    async with open_runner(slots=2) as runner:
        async with runner.start_pipeline([says, sleeps], [pipe]) as joined:
            async with trio.open_nursery() as nursery:
                for run in joined.runs:
                    nursery.start_soon(_drain, run.events)
                await joined.wait_end(0)
                assert joined.unread(0) == 4
                joined.pass_end(0)
                assert joined.unread(0) == 0
                joined.kill()


async def test_a_relayed_stream_may_have_a_limit() -> None:
    pipe = Pipe(writer=0, reader=1, relay=True, limit=100_000)
    flood, other = await run([job("yes"), job("sh", "-c", "cat >/dev/null")], pipe)
    assert (flood.status, flood.message) == ("output_limit", "stopped: output 100000 bytes")
    assert other.ok
    enough, other = await run([job("head", "-c", "100000", "/dev/zero"), job("wc", "-c")], pipe)
    assert (enough.status, other.stdout) == ("ok", b"100000\n")


REFUSED = {
    "the kernel's own": ([job("a"), job("b")], [Pipe(writer=0, reader=1, hold=True)]),
    "limit and hold": ([job("a"), job("b")], [Pipe(writer=0, reader=1, limit=1)]),
    "no job 2": ([job("a"), job("b")], [Pipe(writer=0, reader=2)]),
    "no job -1": ([job("a"), job("b")], [Pipe(writer=-1, reader=0)]),
    "pipeline of 0": ([], []),
    "pipeline of 17": ([job("a")] * 17, []),
    "a stdin": ([job("a"), job("b", stdin=b"x")], [Pipe(writer=0, reader=1)]),
    "a terminal": ([job("a", terminal=Terminal()), job("b")], [Pipe(writer=0, reader=1)]),
    "joined 2 times": ([job("a"), job("b")], [Pipe(writer=0, reader=1)] * 2),
    "collect_to": ([job("a", collect_to="stream")], []),
}


@pytest.mark.parametrize("said", REFUSED)
async def test_what_cannot_be_joined_is_refused(said: str) -> None:
    jobs, pipes = REFUSED[said]
    with pytest.raises(JobError, match=said):
        await run(jobs, *pipes)
