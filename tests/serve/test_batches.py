"""Many jobs of one request: in their order, stopped early, and still there afterwards."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

import sandboxd
from sandboxd import Job, SandboxError
from sandboxd.errors import Busy
from sandboxd.serve.address import Tcp
from sandboxd.serve.callers import Callers, read_tokens
from sandboxd.serve.link import Links
from tests.serve.serving import Daemon, daemon, folder, process
from tests.serve.test_callers import LONG, free_port, tokens
from tests.serve.test_durability import talking
from tests.supervise.variants import policy

ECHO: dict[str, Any] = {"argv": ["cat", "a"], "files": {"a": {"data": "common"}}}


async def lines(served: Daemon, batch: str, query: str = "") -> list[dict[str, Any]]:
    async with served.links.asking("GET", f"/v1/batches/{batch}/events{query}") as answer:
        return [json.loads(line) for line in (await answer.body()).splitlines()]


def outputs(found: list[dict[str, Any]]) -> list[str]:
    return [one["result"]["streams"]["stdout"]["data"] for one in found if one["type"] == "case"]


async def ended(served: Daemon, batch: str) -> dict[str, Any]:
    await lines(served, batch)
    return dict(await served.ask("GET", f"/v1/batches/{batch}"))


async def test_each_case_has_what_is_its_own() -> None:
    async with daemon() as served:
        cases = [
            {},
            {"files": {"a": {"data": "own"}}},
            {"argv": ["sh", "-c", "cat a b"], "files": {"b": {"data": "+"}}},
            {"argv": ["sleep", "100"], "limits": {"wall_time": 0.1}},
        ]
        body = {"id": "b", "job": {**ECHO, "limits": {"processes": 9}}, "cases": cases}
        view = await served.ask("POST", "/v1/batches", body)
        assert [one["id"] for one in view["cases"]] == ["b.0", "b.1", "b.2", "b.3"]
        found = await lines(served, "b")
        assert [(one["type"], one["seq"]) for one in found] == [
            *(("case", number) for number in range(4)), ("end", 4),
        ]  # fmt: skip
        assert outputs(found) == ["common", "own", "common+", ""]
        assert [one.get("status") for one in found[:4]] == ["ok", "ok", "ok", "wall_time_limit"]
        limits = found[3]["result"]["limits"]
        assert (limits["wall_time"]["limit"], limits["processes"]["limit"]) == (0.1, 9)
        assert await lines(served, "b", "?from=2") == found[2:]
        view = await served.ask("GET", "/v1/batches/b")
        assert view["state"] == "done"
        assert (await served.ask("GET", "/v1/jobs/b.1"))["result"] == found[1]["result"]


async def test_results_come_as_they_are_there() -> None:
    async with daemon() as served:
        cases = [{"argv": ["true"]}, {"argv": ["sleep", "100"]}]
        await served.ask("POST", "/v1/batches", {"id": "b", "job": ECHO, "cases": cases})
        async with served.links.asking("GET", "/v1/batches/b/events") as answer:
            first = json.loads(await anext(answer.pieces))
            assert (first["job"], first["status"]) == ("b.0", "ok")
            assert [one["seq"] for one in await lines(served, "b", "?follow=0")] == [0]
            assert (await served.ask("DELETE", "/v1/batches/b"))["id"] == "b"
            rest = b"".join([piece async for piece in answer.pieces]).splitlines()
        assert [json.loads(one).get("status") for one in rest] == ["cancelled", None]


async def test_a_failure_stops_what_comes_after_it() -> None:
    async with daemon(slots=1) as served:
        cases = [{}, {"argv": ["false"]}, *[{"argv": ["sleep", "100"]}] * 5]
        body = {"id": "b", "job": ECHO, "cases": cases, "stop": "failure"}
        await served.ask("POST", "/v1/batches", body)
        view = await ended(served, "b")
        assert [one["status"] for one in view["cases"]] == [
            "ok",
            "nonzero_exit",
            *["cancelled"] * 5,
        ]


async def test_closing_the_connection_cancels_it() -> None:
    async with daemon() as served:
        body = json.dumps({"id": "b", "job": {"argv": ["sleep", "100"]}, "cases": [{}] * 4})
        head = "POST /v1/batches?wait=1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        async with await trio.open_unix_socket(str(served.place / "s")) as stream:
            await stream.send_all((head % len(body) + body).encode())
            await stream.receive_some(100)
        view = await ended(served, "b")
        assert {one["status"] for one in view["cases"]} == {"cancelled"}


async def test_the_same_key_is_the_same_batch_and_an_id_is_taken_once() -> None:
    async with daemon() as served:
        key, body = {"Idempotency-Key": "k"}, {"job": ECHO, "cases": [{}]}
        first = await served.ask("POST", "/v1/batches", body, key)
        again = await served.ask("POST", "/v1/batches", body, key)
        assert first["id"] == again["id"]
        with pytest.raises(SandboxError, match="another batch before"):
            await served.ask("POST", "/v1/batches", {"job": ECHO, "cases": [{}] * 2}, key)
        await served.submit(argv=["true"], id="x.0")
        for taken in (first["id"], "x"):
            with pytest.raises(SandboxError, match="there is a batch"):
                await served.ask("POST", "/v1/batches", {**body, "id": taken})


async def test_what_is_wrong_in_a_case_is_said_and_nothing_is_taken() -> None:
    async with daemon() as served:
        for case, said in (
            ({"files": {"../x": {"data": ""}}}, "below the working directory"),
            ({"files": {"x": {}}}, r"cases\[1\]: files"),
            ({"limits": {"memory": 1 << 50}}, "more than base"),
            ({"files": {"x": {"sha256": "0" * 64}}}, "no file"),
            ({"id": "x"}, "unknown field"),
        ):
            with pytest.raises(SandboxError, match=said):
                await served.ask("POST", "/v1/batches", {"job": ECHO, "cases": [{}, case]})
        with pytest.raises(SandboxError, match="id, interactive"):
            await served.ask("POST", "/v1/batches", {"job": {**ECHO, "id": "x"}, "cases": [{}]})
        with pytest.raises(SandboxError, match="<= 1000"):
            await served.ask("POST", "/v1/batches", {"job": ECHO, "cases": [{}] * 1001})
        large = {"argv": ["true"], "files": {"a": {"data": "x" * 1_000_000}}}
        with pytest.raises(SandboxError, match="store what they have in common"):
            await served.ask("POST", "/v1/batches", {"job": large, "cases": [{}] * 100})
        assert (await served.ask("GET", "/v1/jobs"))["jobs"] == []
        with pytest.raises(SandboxError, match="no such batch"):
            await served.ask("GET", "/v1/batches/b")


async def test_each_case_counts_for_the_quotas() -> None:
    async with daemon(queued=10) as served:
        with pytest.raises(Busy, match="10 jobs of yours"):
            await served.ask("POST", "/v1/batches", {"job": ECHO, "cases": [{}] * 11})
        view = await served.ask("POST", "/v1/batches", {"job": ECHO, "cases": [{}] * 10})
        assert len((await ended(served, view["id"]))["cases"]) == 10


async def test_another_callers_jobs_get_their_turn() -> None:

    with folder() as place:
        callers = Callers(
            uids=frozenset(), tokens=read_tokens(tokens(place, f"a {LONG}\nb {LONG}b"))
        )
        where = Tcp("127.0.0.1", free_port())
        async with daemon(callers=callers, addresses=[where], slots=1) as served:
            links = {name: Links(where, LONG + name.strip("a")) for name in ("a", "b")}
            try:
                served.links = links["a"]
                cases = [{"argv": ["sleep", "0.05"]}] * 20
                await served.ask("POST", "/v1/batches", {"id": "x", "job": ECHO, "cases": cases})
                served.links = links["b"]
                await served.ask("POST", "/v1/jobs?wait=1", {"argv": ["true"]})
                with pytest.raises(SandboxError, match="no such batch"):
                    await served.ask("GET", "/v1/batches/x")
                served.links = links["a"]
                view = await served.ask("GET", "/v1/batches/x")
                assert view["state"] == "running"  # and so the other's job was not the last
            finally:
                for one in links.values():
                    await one.close()


async def test_a_batch_goes_on_after_the_daemon_was_killed() -> None:
    with folder() as place, process(place) as one:
        async with talking(one) as served:
            cases = [
                {"argv": ["sh", "-c", "sleep 0.05; echo $N"], "env": {"N": str(n)}}
                for n in range(30)
            ]
            lasting = {"on_lost": "retry"}
            body: dict[str, Any] = {"id": "b", "job": {"argv": ["x"], **lasting}, "cases": cases}
            await served.ask("POST", "/v1/batches", body)
            stop = [{}, {"argv": ["sh", "-c", "sleep 0.3; false"]}, *[{"argv": ["sleep", "9"]}] * 3]
            body = {
                "id": "s",
                "job": {**ECHO, **lasting},
                "cases": stop,
                "stop": "failure",
            }
            await served.ask("POST", "/v1/batches", body)
            async with served.links.asking("GET", "/v1/batches/b/events") as answer:
                seen = [json.loads(await anext(answer.pieces)) for _ in range(3)]
                one.kill()
        one.start()
        async with talking(one) as served:
            found = seen[:1] + await lines(served, "b", "?from=1")
            assert found[:3] == seen
            assert outputs(found) == [f"{n}\n" for n in range(30)]
            view = await ended(served, "s")
            statuses = [each["status"] for each in view["cases"]]
            assert statuses == ["ok", "nonzero_exit", *["cancelled"] * 3]


async def test_by_the_client() -> None:
    async with daemon() as served, sandboxd.connect(served.url) as client:
        jobs = [
            Job(argv=["cat"], stdin=b"x" * number, policy=policy(), collect=["*"])
            for number in range(4)
        ]
        jobs.append(Job(argv=["no-such-program"], policy=policy()))
        async with client.batch(jobs) as results:
            found = [one async for one in results]
        ok = [one for one in found if isinstance(one, sandboxd.Result)]
        assert [one.stdout for one in ok[:4]] == [b"x" * number for number in range(4)]
        assert [one.status for one in ok] == ["ok"] * 4 + ["start_failed"]
        sleep = [Job(argv=["sleep", "100"], policy=policy())] * 3
        async with client.batch(sleep) as results:
            pass
        while (await client.info()).running:
            pass
