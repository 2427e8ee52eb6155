"""One look at the daemon: what runs with what it uses, what waits, how jobs ended, and whose."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from sandboxd.serve.callers import Caller, Callers
from sandboxd.serve.link import Links
from sandboxd.serve.overview import MOST_FAILURES, Endings, Looks
from tests.serve.serving import Daemon, daemon

pytestmark = pytest.mark.needs("userns")

BUSY = {"argv": ["sh", "-c", "echo ready; while :; do :; done"]}


async def running(served: Daemon, **job: Any) -> str:
    """A job that runs and has said so."""
    name = await served.submit(**job)
    async with served.links.asking("GET", f"/v1/jobs/{name}/events") as answer:
        told = b""
        while b'"stdout"' not in told:
            told += await anext(answer.pieces)
    return name


async def test_what_runs_and_what_waits() -> None:
    async with daemon(slots=1) as served:
        busy = await running(served, **BUSY)
        second = await served.submit(argv=["true"], id="second")
        looks = [await served.ask("GET", "/v1/overview")]
        while not looks[-1]["jobs"][0]["cpu_time"]:
            await trio.sleep(0.05)
            looks.append(await served.ask("GET", "/v1/overview"))
        seen = looks[-1]
        (job,) = seen["jobs"]
        assert job["id"] == busy
        assert job["argv"] == BUSY["argv"]
        assert job["wall_time"] > 0
        assert job["memory"] > 0
        assert [one["id"] for one in seen["waiting"]] == [second]
        assert (seen["running"], seen["queued"], seen["slots"]) == (1, 1, 1)
        assert seen["callers"] == [{"name": seen["caller"], "running": 1, "queued": 1}]
        assert seen["everybody"] is True  # the daemon's own user
        await served.ask("DELETE", f"/v1/jobs/{busy}")
        await served.ended(second)
        seen = await served.ask("GET", "/v1/overview")
        assert seen["statuses"] == {"cancelled": 1, "ok": 1}
        (failure,) = seen["failures"]
        assert (failure["id"], failure["status"]) == (busy, "cancelled")
        assert failure["message"]


async def test_again_and_again() -> None:
    async with daemon() as served:
        for kind, start in (("application/x-ndjson", b"{"), ("text/event-stream", b"data: {")):
            target = "/v1/overview?every=200"
            async with served.links.asking("GET", target, None, {"Accept": kind}) as answer:
                pieces = [await anext(answer.pieces) for _ in range(3)]
            assert all(piece.startswith(start) for piece in pieces)
            looks = [json.loads(piece.removeprefix(b"data: ")) for piece in pieces]
            assert len({one["at"] for one in looks}) == 3


async def test_a_stream_ends_with_the_daemon() -> None:
    async with daemon() as served, trio.open_nursery() as nursery:
        headers = {"Accept": "application/x-ndjson"}
        async with served.links.asking("GET", "/v1/overview?every=200", None, headers) as answer:
            await anext(answer.pieces)
            nursery.start_soon(served.book.drain, 10.0)
            lines = (await answer.body()).splitlines()
        assert json.loads(lines[-1])["draining"] is True


async def test_each_sees_its_own_and_an_overseer_all() -> None:
    async with daemon() as served:
        book, looks = served.book, Looks(served.book)
        await running(served, **BUSY)
        owner = next(iter(book.live))[0]
        for caller, count in (
            (Caller(owner), 1), (Caller("token:other"), 0), (Caller("token:x", overseer=True), 1),
        ):  # fmt: skip
            seen = looks.look(caller)
            assert len(seen.jobs) == seen.running == len(seen.callers) == count
            assert seen.everybody is caller.oversees


def test_overseers_are_named() -> None:
    tokens = {"a": b"", "b": b""}
    callers = Callers(uids=frozenset(), tokens=tokens, overseers=frozenset({"b"}))
    assert "b" in callers.overseers
    assert not Caller("token:b").oversees  # by its name alone nobody is one


def test_endings_are_bounded() -> None:
    from sandboxd.serve.live import About

    endings, about = Endings(), About(argv=("x",), policy="base", priority=5)
    for number in range(3000):
        endings.note(f"c{number % 2}", str(number), about, ("nonzero_exit", "m" * 1000))
    endings.note("c0", "failed", about, ("error", "ours"))
    found = endings.failures("c0")
    assert len(found) == MOST_FAILURES
    assert (found[0].id, found[0].message) == ("failed", "ours")
    assert len(found[1].message) == 300
    assert endings.statuses(None) == {"error": 1, "nonzero_exit": 3000}
    assert endings.statuses("c1") == {"nonzero_exit": 1500}


async def test_the_page_is_open_and_may_load_nothing() -> None:
    async with daemon(callers=Callers(uids=frozenset())) as served:
        async with served.links.asking("GET", "/ui") as answer:
            body, headers = await answer.body(), dict(answer.headers)
        assert headers["content-type"] == "text/html; charset=utf-8"
        rules = headers["content-security-policy"]
        assert rules.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in rules
        for never in (b"http:", b"https:", b"innerHTML", b"<link", b"<img", b" style=", b" src="):
            assert never not in body
        assert await _refused(served.links)


async def _refused(links: Links) -> bool:
    from sandboxd.errors import SandboxError

    try:
        async with links.asking("GET", "/v1/overview") as answer:
            await answer.body()
    except SandboxError:
        return True
    return False
