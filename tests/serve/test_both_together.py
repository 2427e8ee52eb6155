"""One suite for what runs jobs together: a Runner of this process, and a client of a daemon."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

import sandboxd
from sandboxd import Event, Job, JobError, Pipe, Result, SandboxError
from sandboxd.group import Group, Member
from tests.serve.test_both import BOTH, events_of, opened
from tests.supervise.members import SERVE, job, said, waiting
from tests.supervise.test_pipeline import GUESSER, JUDGE, both_ways, python
from tests.supervise.variants import policy

pytestmark = pytest.mark.needs("userns")

Live = sandboxd.GroupRun | sandboxd.ClientGroup
TALKS = ("sh", "-c", "echo ready >&2; exec cat")


def shop() -> Group:
    members = {
        "db": Member(job=job(SERVE), ready="tcp:5432"),
        "web": Member(job=job("found['tcp'] = reach('db.shop', 5432)"), after=["db"]),
    }
    return Group(name="shop", members=members)


async def read(live: Live) -> dict[str, list[Event]]:
    """All events of all members."""
    found: dict[str, list[Event]] = {}

    async def one(name: str) -> None:
        found[name] = await events_of(live.runs[name])

    async with trio.open_nursery() as nursery:
        for name in live.runs:
            nursery.start_soon(one, name)
    return found


@BOTH
async def test_a_group(where: str) -> None:
    async with opened(where) as either:
        found = await either.run_group(shop())
    assert list(found) == ["db", "web"]
    assert said(found["web"])["tcp"].startswith("hello 192.168.100.3")


@BOTH
async def test_what_happens_is_told_by_member(where: str) -> None:
    told: list[tuple[str, Event]] = []

    async def emit(name: str, event: Event) -> None:
        told.append((name, event))

    async with opened(where) as either:
        found = await either.run_group(shop(), emit=emit)
    for name, result in found.items():
        own = [event for who, event in told if who == name]
        assert [event.seq for event in own] == list(range(len(own)))
        assert (own[0].type, own[-1].result) == ("start", result)


@BOTH
async def test_a_group_is_followed(where: str) -> None:
    group = Group(stop="never", members={
        "a": Job(argv=["sh", "-c", "echo 1; exit 3"], policy=policy()),
        "b": Job(argv=["cat"], stdin=None, policy=policy()),
    })  # fmt: skip
    async with opened(where) as either, either.start_group(group) as live:
        stdin = live.runs["b"].stdin
        assert stdin is not None
        await stdin.send_all(b"typed")
        await stdin.aclose()
        told = await read(live)
        found = await live.wait()
        assert (live.group, live.ended_by, sorted(live.ended)) == (group, None, ["a", "b"])
        assert live.decisive(found) == "a"
    assert [event.data for event in told["b"]] == [b"", b"typed", b""]
    assert found["a"].exit_code == 3


@BOTH
async def test_one_ends_the_others(where: str) -> None:
    group = Group(main="a", members={
        "a": Job(argv=["true"], policy=policy()), "b": Job(argv=["sleep", "1000"], policy=policy()),
    })  # fmt: skip
    async with opened(where) as either, either.start_group(group) as live:
        await read(live)
        found = await live.wait()
        assert (live.ended_by, live.decisive(found)) == ("a", "a")
    assert found["b"].status == "cancelled"
    assert "its group was stopped when a ended" in found["b"].message


@BOTH
async def test_a_group_is_killed_or_left(where: str) -> None:
    async with opened(where) as either:
        async with either.start_group(waiting("a", "b")) as live:
            for run in live.runs.values():
                while (await run.events.receive()).type != "stdout":
                    pass
            live.kill()
            await read(live)
            found = await live.wait()
            assert [one.status for one in found.values()] == ["cancelled"] * 2
        async with either.start_group(waiting("a", "b")) as live:
            for run in live.runs.values():
                while (await run.events.receive()).type != "stdout":
                    pass
        with trio.move_on_after(0.5) as scope:
            await either.run_group(waiting("a", "b"))
        assert scope.cancelled_caught
        with trio.fail_after(30):  # both slots come free
            assert (await either.run_group(shop()))["web"].ok


@BOTH
async def test_what_members_use_is_told(where: str) -> None:
    async with opened(where) as either:
        with pytest.raises(JobError, match="usage_every"):
            async with either.start_group(waiting("a"), usage_every=0.001):
                pass
        async with either.start_group(waiting("a", "b"), usage_every=0.05) as live:
            for run in live.runs.values():
                async for event in run.events:
                    if event.usage is not None:
                        break
                wall = run.usage().wall_time
                assert wall is not None
                assert wall > 0


@BOTH
async def test_one_member_is_killed(where: str) -> None:
    group = Group(stop="never", members=waiting("a", "b").members)
    async with opened(where) as either, either.start_group(group) as live:
        async with trio.open_nursery() as nursery:

            async def follow(name: str) -> None:
                async for event in live.runs[name].events:
                    if event.type == "stdout" and name == "a":
                        live.runs["a"].kill()
                    if event.result is not None and name == "a":
                        live.runs["b"].kill()

            for name in live.runs:
                nursery.start_soon(follow, name)
        found = await live.wait()
        assert live.ended == ["a", "b"]
    assert [one.status for one in found.values()] == ["cancelled"] * 2


@BOTH
async def test_a_group_that_cannot_be(where: str) -> None:
    async with opened(where) as either:
        with pytest.raises(JobError, match="3 "):
            await either.run_group(waiting("a", "b", "c"))
        with pytest.raises(JobError, match="not private"):
            await either.run_group(Group(members=waiting("a").members, subnet="8.8.8.0/24"))
        streamed = Job(argv=["true"], collect_to="stream")
        with pytest.raises(JobError, match="stream"):
            await either.run_group(Group(members={"a": streamed}))


@BOTH
async def test_what_members_leave_is_read_one_by_one(where: str) -> None:
    leaves = Job(argv=["sh", "-c", "echo left > x"], collect=["x"], collect_to="stream",
                 policy=policy())  # fmt: skip
    async with opened(where) as either, either.start_group(Group(members={"a": leaves})) as live:
        await read(live)
        await live.wait()
        found = [
            b"".join([piece async for piece in one]) async for one in live.runs["a"].artifacts()
        ]
    assert found == [b"left\n"]


@BOTH
@pytest.mark.parametrize("relay", [False, True])
async def test_a_pipeline(where: str, relay: bool) -> None:
    async with opened(where) as either:
        found = await either.run_pipeline([python(GUESSER), python(JUDGE)], both_ways(relay))
    guesser, judge = found
    assert (guesser.status, judge.exit_code) == ("ok", 42)
    assert (b"613" in guesser.stdout) == relay


@BOTH
async def test_a_pipeline_is_followed_and_killed(where: str) -> None:
    talks = Job(argv=TALKS, policy=policy())
    async with opened(where) as either:
        started = either.start_pipeline([talks, talks], both_ways(False), usage_every=0.05)
        async with started as joined:
            types = set[str]()
            for run in joined.runs:
                async for event in run.events:
                    types.add(event.type)
                    if event.type == "usage":
                        break
            joined.kill()
            async with trio.open_nursery() as nursery:
                for run in joined.runs:
                    nursery.start_soon(events_of, run)
            found = await joined.wait()
            assert await joined.result(1) == found[1]
        assert types >= {"start", "usage"}
        assert [one.status for one in found] == ["cancelled"] * 2


@BOTH
async def test_a_pipeline_that_cannot_be(where: str, tmp_path: Path) -> None:
    async with opened(where) as either:
        with pytest.raises(JobError, match="no job 1"):
            await either.run_pipeline([Job(argv=["a"])], [Pipe(writer=0, reader=1)])
        with pytest.raises(JobError, match="usage_every"):
            async with either.start_pipeline([Job(argv=["a"])], [], usage_every=0.0):
                pass
        held = [Pipe(writer=0, reader=1, relay=True, hold=True)]
        if where == "client":
            with pytest.raises(JobError, match="hold"):
                await either.run_pipeline([Job(argv=["a"]), Job(argv=["b"])], held)
        fed = Job(argv=["cat"], stdin=tmp_path / "nothing")
        with pytest.raises(SandboxError, match="No such file"):
            await either.run_pipeline([fed], [])


@BOTH
async def test_many_at_once(where: str) -> None:
    results: list[Result] = []
    jobs = [Job(argv=["echo", "x"], policy=policy()), Job(argv=["cat"], policy=policy())]
    async with opened(where) as either:

        async def pipeline() -> None:
            results.append((await either.run_pipeline(jobs, [Pipe(writer=0, reader=1)]))[1])

        async def single() -> None:
            results.append(await either.run(jobs[0]))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(pipeline)
                nursery.start_soon(single)
    assert [one.stdout for one in results] == [b"x\n"] * 16


@BOTH
async def test_a_relayed_pipe_has_a_limit(where: str) -> None:
    jobs = [Job(argv=["cat", "/dev/zero"]), Job(argv=["cat"])]
    async with opened(where) as either:
        found = await either.run_pipeline(
            jobs, [Pipe(writer=0, reader=1, relay=True, limit=100_000)]
        )
    assert [one.status for one in found] == ["output_limit", "ok"]
    assert found[1].streams["stdout"].bytes <= 100_000
