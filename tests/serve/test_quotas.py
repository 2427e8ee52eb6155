"""Quotas, priorities and fair shares, seen from outside."""

from __future__ import annotations

import pytest

from sandboxd.errors import Busy, SandboxError
from sandboxd.serve.routes import Bounds
from sandboxd.serve.share import Need
from tests.serve.serving import Daemon, daemon


async def started(served: Daemon, *jobs: str) -> list[str]:
    """The jobs in the order in which they were started."""
    views = [await served.ended(job) for job in jobs]
    return [view["id"] for view in sorted(views, key=lambda view: str(view["started_at"]))]


async def test_the_higher_priority_goes_first() -> None:
    async with daemon(slots=1) as served:
        first = await served.submit(argv=["sleep", "0.5"])
        for name, priority in (("low", 1), ("middle", 5), ("high", 9)):
            await served.submit(argv=["true"], id=name, priority=priority)
        assert await started(served, first, "low", "middle", "high") == [
            first, "high", "middle", "low",
        ]  # fmt: skip


async def test_memory_of_jobs_at_once_keeps_within_the_room() -> None:
    async with daemon(slots=2, room=Need(cpus=4.0, memory=3 << 30)) as served:  # base: 2G each
        first = await served.submit(argv=["sleep", "0.5"])
        second = await served.submit(argv=["true"])
        views = [await served.ended(job) for job in (first, second)]
        assert views[1]["started_at"] >= views[0]["ended_at"]
        small = {"limits": {"memory": 1 << 30}}
        first = await served.submit(argv=["sleep", "100"], **small)
        assert (await served.ended(await served.submit(argv=["true"], **small)))["status"] == "ok"
        assert (await served.ask("GET", f"/v1/jobs/{first}"))["state"] == "running"


async def test_cpu_time_of_an_hour() -> None:
    async with daemon(cpu=0.2) as served:
        burn = {"argv": ["sh", "-c", "while :; do :; done"], "limits": {"cpu_time": 0.4}}
        assert (await served.ask("POST", "/v1/jobs?wait=1", burn))["status"] == "cpu_time_limit"
        with pytest.raises(Busy, match="CPU seconds") as busy:
            await served.submit(argv=["true"])
        assert "ask again in" in busy.value.hint


async def test_bytes_that_a_caller_stores() -> None:
    async with daemon(stored=1000) as served:
        digest = "0" * 64
        with pytest.raises(SandboxError, match=r"a body of|may store"):
            async with served.links.asking("PUT", f"/v1/files/{digest}", b"x" * 2000):
                pass
        job = {"argv": ["sh", "-c", "head -c 2000 /dev/zero > out; printf x > small"]}
        view = await served.ask("POST", "/v1/jobs?wait=1", job | {"collect": ["out", "small"]})
        assert [one["path"] for one in view["result"]["artifact_errors"]] == ["out"]
        assert served.book.files.total() == 1


async def test_requests_that_are_large_together_have_to_wait() -> None:
    async with daemon(bounds=Bounds(body=1000, bodies=1500)) as served:
        async with served.links.asking(
            "POST", "/v1/jobs?wait=1", b'{"argv": ["sleep", "100"]}' + b" " * 900,
            {"Accept": "application/x-ndjson"},
        ) as held:  # fmt: skip
            await anext(held.pieces)
            with pytest.raises(Busy, match="large requests"):
                await served.submit(argv=["true"], env={"x": "y" * 800})
            await served.submit(argv=["true"])
        await served.submit(argv=["true"], id="last")
        await served.ended("last")


async def test_requests_of_jobs_that_wait_are_not_in_memory_and_not_without_bound() -> None:
    async with daemon(slots=1, stored=1_000_000) as served:
        await served.submit(argv=["sleep", "100"])
        job = {"argv": ["sh", "-c", "cat x | wc -c"], "files": {"x": {"data": "x" * 300_000}}}
        last = [await served.submit(**job) for _ in range(3)][-1]
        for live in served.book.live.values():
            if live.state == "queued":
                assert (live.job, live.asked.body, live.asked.wanted.files) == (None, b"", {})
        with pytest.raises(Busy, match="take up too much"):
            await served.submit(**job)
        for name in list(served.book.live):
            if name[1] != last:
                await served.ask("DELETE", f"/v1/jobs/{name[1]}")
        view = await served.ended(last)
        assert view["result"]["streams"]["stdout"]["data"] == "300000\n"
        await served.ended(await served.submit(**job))
