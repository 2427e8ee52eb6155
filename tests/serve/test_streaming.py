"""Output of jobs over the wire: all of it, resumable, and at the pace of who reads it."""

from __future__ import annotations

import json

import pytest
import trio

from sandboxd.errors import SandboxError
from tests.serve.serving import daemon

COUNT = 20_000


def text(events: list[dict[str, object]]) -> str:
    return "".join(str(one["data"]) for one in events if one["type"] == "stdout")


def numbers(count: int) -> str:
    return "".join(f"{number}\n" for number in range(1, count + 1))


async def test_every_byte_once_and_in_order_over_broken_connections() -> None:
    async with daemon(events=1 << 30) as served:
        job = await served.submit(argv=["seq", "300000"], overflow="stall")
        following, found = 0, list[dict[str, object]]()
        while not found or found[-1]["type"] != "exit":
            target = f"/v1/jobs/{job}/events?from={following}"
            async with served.links.asking("GET", target) as answer:
                rest, pieces = b"", 0
                async for piece in answer.pieces:
                    *lines, rest = (rest + piece).split(b"\n")
                    found += [json.loads(one) for one in lines]
                    pieces += 1
                    if pieces >= 3 and lines:  # in the middle of a line as well as not
                        break
            following = int(str(found[-1]["seq"])) + 1
        assert text(found) == numbers(300_000)
        assert [one["seq"] for one in found] == list(range(len(found)))


async def test_after_the_end_the_events_are_still_there() -> None:
    async with daemon() as served:
        job = await served.submit(argv=["seq", str(COUNT)])
        await served.ended(job)
        whole = await served.events(job)
        assert text(whole) == numbers(COUNT)
        assert await served.events(job, "?from=2") == whole[2:]
        assert await served.events(job, f"?from={len(whole)}") == []


async def test_more_than_is_kept_loses_the_oldest_and_says_so() -> None:
    async with daemon(events=1 << 20) as served:
        job = await served.submit(argv=["seq", "1000000"])
        view = await served.ended(job)
        assert view["status"] == "ok"
        kept = await served.events(job)
        assert int(kept[0]["seq"]) > 0
        assert numbers(1_000_000).endswith(text(kept))
        with pytest.raises(SandboxError, match="kept no more") as gone:
            await served.events(job, "?from=0")
        assert gone.value.hint.startswith(f"?from={kept[0]['seq']}")


async def test_a_slow_reader_slows_its_own_job_only() -> None:
    async with daemon(events=1 << 20) as served:
        job = await served.submit(argv=["seq", "2000000"])
        async with served.links.asking("GET", f"/v1/jobs/{job}/events") as slow:
            data = await anext(slow.pieces)
            other = await served.ask("POST", "/v1/jobs?wait=1", {"argv": ["true"]})
            assert other["status"] == "ok"
            assert (await served.ask("GET", f"/v1/jobs/{job}"))["state"] == "running"
            data += b"".join([piece async for piece in slow.pieces])
        assert text([json.loads(one) for one in data.splitlines()]) == numbers(2_000_000)


async def test_a_reader_who_went_away_holds_up_nothing() -> None:
    async with daemon(events=1 << 20) as served:
        job = await served.submit(argv=["seq", "2000000"])
        async with served.links.asking("GET", f"/v1/jobs/{job}/events") as slow:
            await anext(slow.pieces)
        assert (await served.ended(job))["status"] == "ok"


async def test_output_is_there_before_the_end() -> None:
    async with daemon() as served:
        job = await served.submit(argv=["sh", "-c", "echo early; sleep 100"])
        async with served.links.asking("GET", f"/v1/jobs/{job}/events") as answer:
            data = b""
            while b"early" not in data:
                data += await anext(answer.pieces)


async def test_server_sent_events_go_on_after_the_last_one() -> None:
    async with daemon() as served:
        job = await served.submit(argv=["sh", "-c", "echo one; sleep 0.1; echo two"])
        await served.ended(job)
        headers = {"Accept": "text/event-stream", "Last-Event-ID": "0"}
        target = f"/v1/jobs/{job}/events"
        async with served.links.asking("GET", target, headers=headers) as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            blocks = (await answer.body()).decode().strip().split("\n\n")
        assert [one.splitlines()[0] for one in blocks] == ["id: 1", "id: 2", "id: 3"]
        assert blocks[-1].splitlines()[1] == "event: exit"


async def test_usage_comes_as_often_as_asked() -> None:
    async with daemon() as served:
        job = await served.submit(argv=["sleep", "0.5"], usage_every=0.05)
        await served.ended(job)
        assert "usage" in {one["type"] for one in await served.events(job)}


async def test_output_of_a_job_that_is_waited_for_ends_with_the_connection() -> None:
    async with daemon() as served:
        body = json.dumps({"argv": ["yes"], "overflow": "stall"}).encode()
        headers = {"Accept": "application/x-ndjson"}
        asking = served.links.asking("POST", "/v1/jobs?wait=1", body, headers)
        async with asking as answer:
            job = answer.headers["location"].rpartition("/")[2]
            await anext(answer.pieces)
        with trio.fail_after(30):
            assert (await served.ended(job))["status"] == "cancelled"
