"""Every route, asked of a daemon that runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator

import h11
import pytest
import trio

import sandboxd
from sandboxd.errors import Busy, JobError, PolicyError, SandboxError
from sandboxd.serve.api import ROUTES, openapi
from sandboxd.serve.routes import Bounds
from tests.serve.serving import TRUE, daemon


async def test_a_job_that_is_waited_for() -> None:
    async with daemon() as served:
        job = {"argv": ["sh", "-c", "cat; echo $X; exit 3"], "stdin": "in\n", "env": {"X": "x"}}
        view = await served.ask("POST", "/v1/jobs?wait=1", job)
        assert (view["state"], view["status"]) == ("done", "nonzero_exit")
        assert view["result"]["streams"]["stdout"]["data"] == "in\nx\n"
        assert view["result"]["job"] == view["id"]
        assert (await served.ask("GET", f"/v1/jobs/{view['id']}"))["result"] == view["result"]


async def test_a_job_that_is_asked_for_later() -> None:
    async with daemon() as served:
        await served.ask("POST", "/v1/jobs", {"argv": ["echo", "hi"], "id": "mine", "priority": 7})
        view = await served.ended("mine")
        assert view["result"]["streams"]["stdout"]["data"] == "hi\n"
        assert (view["attempts"], view["priority"], view["policy"]) == (1, 7, "base")
        events = await served.events("mine")
        assert [one["type"] for one in events] == ["start", "stdout", "exit"]
        assert events[-1]["result"] == view["result"]


async def test_bytes_that_are_no_text_arrive() -> None:
    async with daemon() as served:
        job = {"argv": ["cat", {"b64": "/w=="}], "files": {"a": {"b64": "AP8="}}, "stdin": ""}
        view = await served.ask("POST", "/v1/jobs?wait=1", job | {"argv": ["cat", "a"]})
        assert view["result"]["streams"]["stdout"]["data_b64"] == "AP8="
        view = await served.ask("POST", "/v1/jobs?wait=1", job)
        assert view["argv"] == ["cat", "\\xff"]


async def test_closing_a_waiting_request_cancels_its_job() -> None:
    async with daemon() as served:
        body = json.dumps({"argv": ["sleep", "100"], "id": "x"}).encode()
        head = b"POST /v1/jobs?wait=1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        stream = await trio.open_unix_socket(str(served.place / "s"))
        await stream.send_all(head % len(body) + body)
        while "x" not in [one["id"] for one in (await served.ask("GET", "/v1/jobs"))["jobs"]]:
            pass
        await stream.aclose()
        assert (await served.ended("x"))["status"] == "cancelled"


async def test_cancelling_by_delete_while_it_runs_and_while_it_waits() -> None:
    async with daemon(slots=1) as served:
        first = await served.submit(argv=["sleep", "100"])
        second = await served.submit(argv=["sleep", "100"])
        await served.ask("DELETE", f"/v1/jobs/{second}")
        assert (await served.ended(second))["result"]["status"] == "cancelled"
        assert (await served.ask("GET", f"/v1/jobs/{second}"))["started_at"] is None
        await served.ask("DELETE", f"/v1/jobs/{first}")
        assert (await served.ended(first))["status"] == "cancelled"
        assert (await served.ask("DELETE", f"/v1/jobs/{first}"))["state"] == "done"


async def test_the_same_key_is_the_same_job() -> None:
    async with daemon() as served:
        key = {"Idempotency-Key": "k"}
        first = await served.ask("POST", "/v1/jobs", TRUE, key)
        again = await served.ask("POST", "/v1/jobs?wait=1", TRUE, key)
        assert (again["id"], again["status"], again["attempts"]) == (first["id"], "ok", 1)
        with pytest.raises(SandboxError, match="another job before"):
            await served.ask("POST", "/v1/jobs", {"argv": ["false"]}, key)


async def test_two_jobs_cannot_have_one_id() -> None:
    async with daemon() as served:
        await served.submit(argv=["true"], id="x")
        with pytest.raises(SandboxError, match="there is a job 'x'"):
            await served.submit(argv=["true"], id="x")


async def test_an_interactive_job_is_fed() -> None:
    async with daemon() as served:
        job = await served.submit(argv=["cat"], interactive=True)
        for word, query in ((b"one ", ""), (b"two", "?eof=1")):
            async with served.links.asking("POST", f"/v1/jobs/{job}/stdin{query}", word) as answer:
                assert answer.status == 204
        assert (await served.ended(job))["result"]["streams"]["stdout"]["data"] == "one two"
        with pytest.raises(SandboxError, match="over"):
            await served.ask("POST", f"/v1/jobs/{job}/stdin", "x")


async def test_a_job_that_is_not_interactive_is_not_fed() -> None:
    async with daemon() as served:
        job = await served.submit(argv=["sleep", "100"])
        with pytest.raises(SandboxError, match="not interactive"):
            await served.ask("POST", f"/v1/jobs/{job}/stdin", "x")


async def test_a_signal_that_kills_and_one_that_is_none() -> None:
    async with daemon() as served:
        job = await served.submit(argv=["sleep", "100"])
        with pytest.raises(SandboxError, match="HUP"):
            await served.ask("POST", f"/v1/jobs/{job}/signal", {"signal": "HUP"})
        body = b'{"signal": "KILL"}'
        async with served.links.asking("POST", f"/v1/jobs/{job}/signal", body) as answer:
            assert answer.status == 204
        assert (await served.ended(job))["status"] == "cancelled"


async def test_files_go_in_and_out_by_their_digest() -> None:
    async with daemon() as served:
        data = bytes(range(256)) * 10_000
        digest = hashlib.sha256(data).hexdigest()
        async with served.links.asking("PUT", f"/v1/files/{digest}", data) as answer:
            assert await answer.json() == {"sha256": digest, "bytes": len(data)}
        job = {
            "argv": ["sh", "-c", "cat in > out"],
            "files": {"in": {"sha256": digest}},
            "collect": ["out"],
        }
        view = await served.ask("POST", "/v1/jobs?wait=1", job)
        assert [one["sha256"] for one in view["result"]["artifacts"]] == [digest]
        async with served.links.asking("GET", f"/v1/files/{digest}") as answer:
            assert await answer.body() == data


async def test_a_file_that_is_not_what_it_is_called() -> None:
    async with daemon() as served:
        with pytest.raises(SandboxError, match="its SHA-256 is"):
            async with served.links.asking("PUT", f"/v1/files/{'0' * 64}", b"x"):
                pass
        with pytest.raises(SandboxError, match="no file"):
            await served.ask("GET", f"/v1/files/{'0' * 64}")
        with pytest.raises(SandboxError, match="no file"):
            await served.submit(argv=["cat", "a"], files={"a": {"sha256": "0" * 64}})


async def test_what_is_wrong_is_said_with_the_way_out() -> None:
    async with daemon() as served:
        with pytest.raises(PolicyError, match="no policy 'nope'") as wrong:
            await served.submit(argv=["true"], policy="nope")
        assert "base" in wrong.value.hint
        with pytest.raises(PolicyError, match="more than base"):
            await served.submit(argv=["true"], limits={"memory": 1 << 50})
        with pytest.raises(PolicyError, match="is a path"):
            await served.submit(argv=["true"], policy="/etc/passwd.toml")
        with pytest.raises(JobError, match="below the working directory"):
            await served.submit(argv=["true"], files={"../x": {"data": ""}})
        with pytest.raises(SandboxError, match=r"argv"):
            await served.submit(argv=[])
        with pytest.raises(SandboxError, match="unknown field `argw`"):
            await served.submit(argv=["true"], argw=1)
        with pytest.raises(SandboxError, match="no such job"):
            await served.ask("GET", "/v1/jobs/nobody")
        with pytest.raises(SandboxError, match="no such path"):
            await served.ask("GET", "/v2/jobs")
        with pytest.raises(SandboxError, match="not for this path"):
            await served.ask("PUT", "/v1/jobs", {})


async def test_a_program_that_is_not_there_is_a_result() -> None:
    async with daemon() as served:
        view = await served.ask("POST", "/v1/jobs?wait=1", {"argv": ["no-such-program"]})
        assert (view["status"], view["result"]["error"]) == ("start_failed", "ENOENT")


async def test_lists_come_in_pages() -> None:
    async with daemon() as served:
        names = [await served.submit(argv=["true"], id=f"j{number}") for number in range(5)]
        for name in names:
            await served.ended(name)
        page = await served.ask("GET", "/v1/jobs?limit=3&state=done")
        rest = await served.ask("GET", f"/v1/jobs?limit=3&before={page['next']}")
        assert [one["id"] for one in page["jobs"] + rest["jobs"]] == names[::-1]
        assert (await served.ask("GET", "/v1/jobs?state=queued"))["jobs"] == []


async def test_what_the_daemon_says_of_itself() -> None:
    async with daemon() as served:
        info = await served.ask("GET", "/v1/info")
        assert (info["version"], info["slots"]) == (sandboxd.__version__, 2)
        assert "base" in [one["name"] for one in await served.ask("GET", "/v1/policies")]
        await served.ask("POST", "/v1/jobs?wait=1", TRUE)
        for path, word in (("/healthz", b"ok"), ("/readyz", b"ok"), ("/metrics", b"_bucket{le=")):
            async with served.links.asking("GET", path) as answer:
                assert word in await answer.body()
        async with served.links.asking("HEAD", "/v1/info") as answer:
            assert (answer.headers["content-length"], await answer.body()) != ("0", b"x")


async def test_traceparent_is_passed_on() -> None:
    async with daemon() as served:
        good = f"00-{'a' * 32}-{'b' * 16}-01"
        for given, kept in (
            (good, good),
            ("00-0-0-0", None),
            (f"00-{'0' * 32}-{'b' * 16}-01", None),
        ):
            view = await served.ask("POST", "/v1/jobs?wait=1", TRUE, {"traceparent": given})
            assert view["traceparent"] == kept


async def test_the_description_is_of_these_routes_and_types() -> None:
    described = openapi()
    there = {(path, method) for path, one in described["paths"].items() for method in one}
    assert there == {(route.path, route.method.lower()) for route in ROUTES}
    text = json.dumps(described)
    names = {one.rpartition("/")[2] for one in text.split('"') if one.startswith("#/components")}
    assert names <= described["components"]["schemas"].keys()
    async with daemon() as served:
        assert await served.ask("GET", "/openapi.json") == json.loads(text)


async def test_a_full_queue_says_when_to_ask_again() -> None:
    async with daemon(slots=1, queued=1) as served:
        await served.submit(argv=["sleep", "100"])
        job = await served.submit(argv=["sleep", "100"])
        with pytest.raises(Busy, match="waiting already"):
            await served.submit(argv=["true"])
        await served.ask("DELETE", f"/v1/jobs/{job}")
        await served.submit(argv=["true"])


async def test_small_requests_in_chunks_take_what_they_are() -> None:
    """And not what a request may be at most: they would be refused as too many large ones."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"argv": ["sleep", "1000"]}'

    bounds = Bounds(body=1 << 20, bodies=3 << 20)
    async with daemon(bounds=bounds, slots=8) as served, trio.open_nursery() as nursery:

        async def ask(target: str) -> None:
            async with served.links.asking("POST", target, chunks()):
                raise AssertionError("it sleeps")

        for _ in range(4):
            nursery.start_soon(ask, "/v1/jobs?wait=1")
        while served.book.share.running < 4:
            await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()


async def test_nobody_feeds_a_job_that_is_over() -> None:
    """Whoever feeds it hears so at once, and not when the next word is said."""
    async with daemon() as served:
        job = await served.submit(argv=["sh", "-c", "head -c 1; sleep 0.2"], interactive=True)
        while (await served.ask("GET", f"/v1/jobs/{job}"))["state"] != "running":
            pass
        link = await served.links._open()
        async with link.stream:
            head = h11.Request(
                method="POST", target=f"/v1/jobs/{job}/stdin",
                headers=[("Host", "localhost"), ("Transfer-Encoding", "chunked")],
            )  # fmt: skip
            await link.stream.send_all(link.machine.send(head) or b"")
            await link.stream.send_all(link.machine.send(h11.Data(data=b"x")) or b"")
            answer = await link.event()
            assert answer.status_code == 409
            assert b"the job is over" in b"".join([piece async for piece in link.pieces()])
        assert (await served.ended(job))["result"]["streams"]["stdout"]["data"] == "x"
