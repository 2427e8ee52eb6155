"""Groups and pipelines begin and end whole, whoever goes away, and whenever: nothing is left."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import sandboxd
from sandboxd import HostError, Job
from sandboxd.errors import Busy
from sandboxd.group import Group
from sandboxd.stores.volumes import Shelf
from tests.serve.serving import TRUE, Daemon, Process, daemon, folder, process
from tests.serve.test_together import WAITS, members, started, until
from tests.supervise.members import waiting

pytestmark = pytest.mark.needs("userns")


async def test_who_goes_away_ends_it() -> None:
    async with daemon() as served:
        async with started(served, members(a=WAITS, b=WAITS) | {"id": "g"}):
            view = await served.ask("GET", "/v1/groups/g")
            assert [one["state"] for one in view["members"].values()] == ["running"] * 2
            assert served.book.share.running == 2
        for job in ("g.a", "g.b"):
            assert (await served.ended(job))["status"] == "cancelled"
        data = json.dumps({"jobs": [WAITS, WAITS], "id": "p"}).encode()
        async with await trio.open_unix_socket(str(served.place / "s")) as stream:
            head = f"POST /v1/pipelines?wait=1 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}"
            await stream.send_all(f"{head}\r\n\r\n".encode() + data)

            async def runs() -> bool:
                looks = await served.ask("GET", "/v1/overview")
                return [one["id"] for one in looks["jobs"]] == ["p.0", "p.1"]

            with trio.fail_after(30):
                await until(runs)
        assert (await served.ended("p.0"))["status"] == "cancelled"
        assert (await served.ended("p.1"))["status"] == "cancelled"


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("what", ["group", "pipeline"])
async def test_who_goes_away_at_any_time(seconds: float, what: str) -> None:
    """Waiting, set up half-way or running: nothing is left, and the next one has its slots."""
    async with daemon() as served, sandboxd.connect(served.url) as client:
        for _ in range(3):
            with trio.move_on_after(seconds):
                if what == "group":
                    await client.run_group(waiting("a", "b"))
                else:
                    await client.run_pipeline(list(waiting("a", "b").members.values()), [])  # type: ignore[arg-type]
        again = await client.run_group(Group(members={one: Job(argv=["true"]) for one in "ab"}))
        assert [one.status for one in again.values()] == ["ok", "ok"]
        book = served.book
        with trio.fail_after(30):
            while book.live or book.guests or book.share.running:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert not book._bodies
        assert not book._queue
        assert not book.coming


async def test_it_is_cancelled_while_it_is_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its slots, and waits for a cache that somebody else has."""
    monkeypatch.setenv("SANDBOXD_CACHES", str(tmp_path / "caches"))
    shelf = Shelf.own("cache")
    shelf.create("pip", None)
    mount = {"type": "cache", "name": "pip", "target": "/cache", "lock": "exclusive", "wait": 900.0}
    waits = {**TRUE, "policy": {"mounts": [mount]}}
    lock = os.open(shelf.lock_file("pip"), os.O_RDWR)  # as another process would
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with daemon() as served, trio.open_nursery() as nursery:
            views = []

            async def ask() -> None:
                body = members(a=waits, b=TRUE) | {"id": "g"}
                views.append(await served.ask("POST", "/v1/groups?wait=1", body))

            async def placed() -> bool:
                return served.book.share.running == 2

            nursery.start_soon(ask)
            await until(placed)
            assert (await served.ask("DELETE", "/v1/groups/g"))["state"] == "running"
        assert [one["status"] for one in views[0]["members"].values()] == ["cancelled"] * 2
    finally:
        os.close(lock)


async def test_it_waits_for_all_its_slots_and_is_cancelled_while_it_does() -> None:
    async with daemon() as served:
        busy = await served.submit(**WAITS)
        async with trio.open_nursery() as nursery:
            views = []

            async def ask() -> None:
                body = members(a=TRUE, b=TRUE) | {"id": "g"}
                views.append(await served.ask("POST", "/v1/groups?wait=1", body))

            async def queued() -> bool:
                return served.book.share.queued == 2

            nursery.start_soon(ask)
            await until(queued)
            looks = await served.ask("GET", "/v1/overview")
            assert [one["id"] for one in looks["waiting"]] == ["g.a", "g.b"]
            assert (looks["running"], looks["queued"]) == (1, 2)
            after = await served.submit(**TRUE)  # which could run, but does not get past it
            assert (await served.ask("GET", f"/v1/jobs/{after}"))["state"] == "queued"
            assert (await served.ask("DELETE", "/v1/groups/g"))["state"] == "queued"
        (view,) = views
        assert [one["status"] for one in view["members"].values()] == ["cancelled"] * 2
        assert (await served.ended(after))["status"] == "ok"
        await served.ask("DELETE", f"/v1/jobs/{busy}")
        assert (await served.ended(busy))["status"] == "cancelled"
        assert served.book.share.running == served.book.share.queued == 0


async def test_a_member_that_is_cancelled_while_all_wait_never_runs() -> None:
    async with daemon() as served:
        busy = await served.submit(**WAITS)
        async with trio.open_nursery() as nursery:
            views = []

            async def ask() -> None:
                body = members(a=WAITS, b=TRUE) | {"id": "g", "stop": "never"}
                views.append(await served.ask("POST", "/v1/groups?wait=1", body))

            async def queued() -> bool:
                return served.book.share.queued == 2

            nursery.start_soon(ask)
            await until(queued)
            await served.ask("DELETE", "/v1/jobs/g.a")
            await served.ask("DELETE", f"/v1/jobs/{busy}")
        found = {name: one["status"] for name, one in views[0]["members"].items()}
        assert found == {"a": "cancelled", "b": "ok"}


async def test_the_daemon_is_killed_meanwhile() -> None:
    with folder() as place, process(place) as one:
        async with _connected(one) as client:
            with pytest.raises(HostError, match="the daemon at") as error:
                await _killed(client, one)
            assert error.value.missing == "daemon"
        one.start()
        await (await one.links()).close()  # the fixture looks for what is left


async def _killed(client: sandboxd.Client, one: Process) -> None:
    async with client.start_group(waiting("a", "b")) as live:
        async with trio.open_nursery() as nursery:
            for run in live.runs.values():
                nursery.start_soon(_first_words, run)
        one.kill()
        async with trio.open_nursery() as nursery:
            for run in live.runs.values():
                nursery.start_soon(_rest, run)
        await live.wait()


async def _killed_alone(client: sandboxd.Client, one: Process) -> None:
    async with client.start(Job(argv=WAITS["argv"])) as run:
        await _first_words(run)
        one.kill()
        await _rest(run)


@asynccontextmanager
async def _connected(one: Process):  # type: ignore[no-untyped-def]
    await (await one.links()).close()
    async with sandboxd.connect(f"unix://{one.place}/s") as client:
        yield client


async def _first_words(run: sandboxd.ClientRun) -> None:
    while (await run.events.receive()).type != "stdout":
        pass


async def _rest(run: sandboxd.ClientRun) -> None:
    async for _ in run.events:
        pass


async def test_a_run_whose_daemon_is_killed_ends_with_what_the_reference_says() -> None:
    with folder() as place, process(place) as one:
        async with _connected(one) as client:
            with pytest.raises(HostError, match="the daemon at"):
                await _killed_alone(client, one)
        one.start()
        await (await one.links()).close()


async def test_it_goes_down_with_those_who_wait_and_those_who_run() -> None:
    with folder() as place, process(place) as one:
        links = await one.links()
        served = Daemon(place, None, links)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            refused = []

            async def ask() -> None:
                with pytest.raises(Busy, match="going down") as error:
                    await served.ask("POST", "/v1/groups?wait=1", members(a=TRUE, b=TRUE))
                refused.append(error.value)

            async with started(served, members(a=WAITS, b=WAITS)):
                nursery.start_soon(ask)

                async def queued() -> bool:
                    return bool((await served.ask("GET", "/v1/info"))["queued"] == 2)

                await until(queued)
                assert await trio.to_thread.run_sync(one.kill, 15) == 0
        assert len(refused) == 1
        assert "Traceback" not in one.errors()
        await links.close()
