"""Groups and pipelines by a daemon: one request, all slots at once, gone with its connection."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

import sandboxd
from sandboxd import Job, JobError, LaunchError, PolicyError, SandboxError
from sandboxd.errors import Busy
from sandboxd.group import Group, Member
from sandboxd.policy import Mount, Policy
from sandboxd.serve.address import Tcp, Unix
from sandboxd.serve.callers import Callers, read_tokens
from sandboxd.serve.link import Links
from tests.serve.serving import TRUE, Daemon, daemon, folder
from tests.serve.test_callers import LONG, free_port, tokens
from tests.supervise.members import waiting
from tests.supervise.variants import policy

pytestmark = pytest.mark.needs("userns")

NDJSON = {"Accept": "application/x-ndjson"}
WAITS: dict[str, Any] = {"argv": ["sh", "-c", "echo up; exec sleep 1000"]}


def members(**jobs: dict[str, Any]) -> dict[str, Any]:
    return {"members": {name: {"job": job} for name, job in jobs.items()}}


async def told(served: Daemon, path: str, body: object, accept: str = "") -> list[dict[str, Any]]:
    """All events of a request."""
    data, headers = json.dumps(body).encode(), {"Accept": accept or NDJSON["Accept"]}
    async with served.links.asking("POST", f"{path}?wait=1", data, headers) as answer:
        return [json.loads(line) for line in (await answer.body()).splitlines()]


@asynccontextmanager
async def started(served: Daemon, body: object, path: str = "/v1/groups"):  # type: ignore[no-untyped-def]
    """A request all of whose members have said something; leaving closes its connection."""
    names = set[bytes]()
    data = json.dumps(body).encode()
    async with await trio.open_unix_socket(str(served.place / "s")) as stream:
        head = f"POST {path}?wait=1 HTTP/1.1\r\nHost: x\r\nAccept: {NDJSON['Accept']}\r\n"
        await stream.send_all(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        text = b""
        wanted = body["members"] if "members" in body else range(len(body["jobs"]))  # type: ignore[operator,index]
        while len(names) < len(wanted):
            text += await stream.receive_some(1 << 16)
            lines = [line for line in text.splitlines() if b'"stdout"' in line]
            names = {line.split(b'"member":"')[1].split(b'"')[0] for line in lines}
        yield text


async def until(true: Callable[[], Awaitable[object]]) -> None:
    while not await true():  # noqa: ASYNC110
        await trio.sleep(0.01)


async def test_members_reach_each_other_and_are_jobs() -> None:
    serve = "import socket as s; a = s.create_server(('', 5432)); c = a.accept()[0]; c.send(b'hi')"
    ask = "import socket as s; print(s.create_connection(('db.shop', 5432)).recv(9).decode())"
    body = {
        "id": "g", "name": "shop", "main": "web",
        "members": {
            "db": {"job": {"argv": ["python3", "-c", serve]}, "ready": "tcp:5432"},
            "web": {"job": {"argv": ["python3", "-c", ask]}, "after": ["db"]},
        },
    }  # fmt: skip
    async with daemon() as served:
        view = await served.ask("POST", "/v1/groups?wait=1", body)
        assert (view["id"], view["state"], view["decisive"]) == ("g", "done", "web")
        web = view["members"]["web"]
        assert (web["id"], web["status"]) == ("g.web", "ok")
        assert web["result"]["streams"]["stdout"]["data"] == "hi\n"
        assert web["result"]["enforcement"]["network"] == "group: bridge, nftables"
        assert await served.ask("GET", "/v1/jobs/g.web") == web  # kept as any job
        types = [one["type"] for one in await served.events("g.web")]
        assert types == ["start", "stdout", "exit"]
        with pytest.raises(SandboxError, match="no such group"):
            await served.ask("GET", "/v1/groups/g")
        with pytest.raises(SandboxError, match=r"there is a job 'g\.db'"):
            await served.ask("POST", "/v1/groups?wait=1", body)
        metrics = served.book.metrics.text().decode()
        assert "sandboxd_jobs_accepted_total 2" in metrics
        assert 'sandboxd_jobs_refused_total{why="conflict"} 2' in metrics
        assert "sandboxd_queue_seconds_count 2" in metrics


async def test_events_say_whose_they_are() -> None:
    body = members(a={"argv": ["echo", "1"]}, b={"argv": ["sh", "-c", "echo 2 >&2; exit 3"]})
    async with daemon() as served:
        found = await told(served, "/v1/groups", body | {"stop": "never"})
        for name, types in (("a", ["start", "stdout", "exit"]), ("b", ["start", "stderr", "exit"])):
            own = [one for one in found if one.get("member") == name]
            assert [one["type"] for one in own] == types
            assert [one["seq"] for one in own] == [0, 1, 2]
        end = {"v": 1, "seq": 2, "type": "end", "ended_by": None, "decisive": "b"}
        assert found[-1] == end
        data = json.dumps(body).encode()
        accept = {"Accept": "text/event-stream"}
        async with served.links.asking("POST", "/v1/groups?wait=1", data, accept) as answer:
            text = (await answer.body()).decode()
        assert text.startswith('id: 0\nevent: start\ndata: {"v":1,"seq":0,"type":"start","member"')
        assert 'event: end\ndata: {"v":1,' in text


async def test_a_pipeline() -> None:
    jobs = [{"argv": ["sh", "-c", "seq 1000; exit 3"]}, {"argv": ["wc", "-l"]}]
    async with daemon() as served:
        for relay in (False, True):
            body = {"jobs": jobs, "pipes": [{"writer": 0, "reader": 1, "relay": relay}]}
            view = await served.ask("POST", "/v1/pipelines?wait=1", body)
            first, second = (one["result"] for one in view["jobs"])
            assert second["streams"]["stdout"]["data"] == "1000\n"
            assert (first["status"], "stdout" in first["streams"]) == ("nonzero_exit", relay)
        joined = {"jobs": jobs, "pipes": [{"writer": 0, "reader": 1}]}
        found = await told(served, "/v1/pipelines", joined)
        assert [one["type"] for one in found if one.get("member") == "1"][-1] == "exit"
        assert found[-1] == {"v": 1, "seq": 2, "type": "end"}
        found = await told(served, "/v1/pipelines", {"jobs": [WAITS | {"limits": {"wall_time": 1}}],
                                                     "usage_every": 0.05})  # fmt: skip
        assert "usage" in {one["type"] for one in found}


async def test_what_cannot_be_is_refused_and_nothing_is_taken() -> None:
    wrong: list[tuple[str, dict[str, Any], str, int]] = [
        ("groups", members(a=TRUE, b=TRUE, c=TRUE), "3 jobs together, and 2", 422),
        ("groups", members(a=TRUE, b={**TRUE, "policy": "nope"}), "members.b: .*no policy", 422),
        ("groups", members(a={**TRUE, "policy": "./x.toml"}), "members.a: .* is a path", 422),
        ("groups", members(a={**TRUE, "files": {"x": {}}}), "members.a: files", 422),
        ("groups", members(a={**TRUE, "limits": {"memory": 1 << 50}}), "more than base", 422),
        ("groups", members(a={**TRUE, "on_lost": "retry"}), "on_lost is not for one", 422),
        ("groups", members(a={**TRUE, "id": "x"}, b={**TRUE, "id": "x"}), "there twice", 409),
        ("groups", members(A=TRUE), "no name of a host", 422),
        ("groups", members(), "length >= 1", 422),
        ("groups", members(a=TRUE) | {"main": "b"}, "no member 'b'", 422),
        ("groups", members(a=TRUE) | {"subnet": "8.8.8.0/24"}, "not private", 422),
        ("groups", {"members": {"a": {"job": TRUE, "after": ["a"]}}}, "wait for each other", 422),
        ("groups", {"members": {"a": {"job": TRUE, "x": 1}}}, "unknown field", 422),
        ("pipelines", {"jobs": [TRUE], "pipes": [{"writer": 0, "reader": 1}]}, "no job 1", 422),
        ("pipelines", {"jobs": [TRUE], "pipes": [{"writer": 0, "reader": 99}]}, "<= 15", 422),
        ("pipelines", {"jobs": [TRUE] * 17}, "<= 16", 422),
        ("pipelines", {"jobs": [{**TRUE, "usage_every": 1}]}, "usage_every is not for one", 422),
        ("pipelines", {"jobs": [TRUE], "id": "x" * 65}, "matching regex", 422),
    ]
    async with daemon() as served:
        for path, body, said, status in wrong:
            with pytest.raises(SandboxError, match=said):
                await served.ask("POST", f"/v1/{path}?wait=1", body)
            assert (await status_of(served, f"/v1/{path}?wait=1", body)) == status
        for query, headers in (("", {}), ("?wait=1", {"Idempotency-Key": "k"})):
            with pytest.raises(SandboxError, match="belongs to its connection"):
                await served.ask("POST", f"/v1/groups{query}", members(a=TRUE), headers)
        assert (await served.ask("GET", "/v1/jobs"))["jobs"] == []
        assert (served.book.live, served.book.guests, served.book.share.queued) == ({}, {}, 0)
        assert served.book.coming == set()
        assert not served.book._bodies
        large = members(a={**TRUE, "stdin": "x" * (17 << 20)})
        assert (await status_of(served, "/v1/groups?wait=1", large)) == 413
        assert (await status_of(served, "/v1/groups?wait=1", "{")) == 400


async def status_of(served: Daemon, target: str, body: object) -> int:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    async with await trio.open_unix_socket(str(served.place / "s")) as stream:
        head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        await stream.send_all(head.encode())
        with suppress(trio.BrokenResourceError):  # it has said no already
            await stream.send_all(data)
        return int((await stream.receive_some(1 << 16)).split(b" ", 2)[1])


async def test_more_jobs_than_slots_are_a_pipeline_nevertheless() -> None:
    jobs = [{"argv": ["seq", "9"]}, *[{"argv": ["cat"]}] * 2, {"argv": ["wc", "-l"]}]
    pipes = [{"writer": one, "reader": one + 1} for one in range(3)]
    async with daemon(slots=1) as served:
        view = await served.ask("POST", "/v1/pipelines?wait=1", {"jobs": jobs, "pipes": pipes})
        assert view["jobs"][3]["result"]["streams"]["stdout"]["data"] == "9\n"


async def test_a_member_that_cannot_start_ends_the_others() -> None:
    async with daemon() as served:
        view = await served.ask("POST", "/v1/groups?wait=1",
                                members(a={"argv": ["/no/such"]}, b=WAITS))  # fmt: skip
        found = {name: one["status"] for name, one in view["members"].items()}
        assert found == {"a": "start_failed", "b": "cancelled"}
        assert (view["ended_by"], view["decisive"]) == ("a", "a")
        broken = {**TRUE, "policy": {"mounts": [{"target": "/x", "source": "/no/such/place"}]}}
        view = await served.ask("POST", "/v1/groups?wait=1", members(a=WAITS, b=broken))
        assert view["members"]["b"]["result"]["error"]["kind"] == "launch"
        assert view["members"]["a"]["status"] == "cancelled"
        view = await served.ask("POST", "/v1/pipelines?wait=1", {"jobs": [WAITS, broken]})
        assert [one["status"] for one in view["jobs"]] == ["cancelled", "error"]
        network = {"network": {"mode": "user", "allow": ["example.org:1"]}}
        differ = members(a={**TRUE, "policy": network}, b=TRUE) | {"share": "network"}
        view = await served.ask("POST", "/v1/groups?wait=1", differ)  # nothing could be begun
        assert {one["status"] for one in view["members"].values()} == {"error"}
        assert served.book.share.running == 0


async def test_stdin_and_signals_of_a_member() -> None:
    body = {"jobs": [{"argv": ["cat"], "interactive": True}, {"argv": ["cat"]}], "id": "p",
            "pipes": [{"writer": 0, "reader": 1}]}  # fmt: skip
    async with daemon() as served:
        data = json.dumps(body).encode()
        async with served.links.asking("POST", "/v1/pipelines?wait=1", data, NDJSON) as answer:
            assert answer.headers["location"] == "/v1/pipelines/p"
            async with served.links.asking("POST", "/v1/jobs/p.0/stdin?eof=1", b"typed") as fed:
                await fed.body()
            text = b"".join([piece async for piece in answer.pieces])
        assert b'"type":"stdout","member":"1","data":"typed"' in text


async def test_quotas_hold_for_all_of_them() -> None:
    async with daemon(running=1, queued=3) as served:
        with pytest.raises(JobError, match="2 jobs together, and 1 of yours"):
            await served.ask("POST", "/v1/groups?wait=1", members(a=TRUE, b=TRUE))
        with pytest.raises(JobError, match="2 jobs together, and 1 of yours"):
            await served.ask("POST", "/v1/pipelines?wait=1", {"jobs": [TRUE] * 2})
    async with daemon(queued=1) as served:
        with pytest.raises(Busy, match="1 jobs of yours are waiting"):
            await served.ask("POST", "/v1/groups?wait=1", members(a=TRUE, b=TRUE))
    async with daemon(stored=100) as served:
        with pytest.raises(Busy, match="take up too much"):
            await served.ask("POST", "/v1/groups?wait=1", members(a={**TRUE, "stdin": "x" * 100}))
    async with daemon() as served:
        served.book.draining = True
        with pytest.raises(Busy, match="going down"):
            await served.ask("POST", "/v1/groups?wait=1", members(a=TRUE))
        served.book.draining = False


async def test_nobody_sees_anothers_and_policies_are_the_operators() -> None:
    with folder() as place:
        callers = Callers(uids=frozenset({os.getuid()}),
                          tokens=read_tokens(tokens(place, f"a {LONG}\nb {LONG}b")))  # fmt: skip
        where = Tcp("127.0.0.1", free_port())
        addresses = [Unix(place / "s"), where]
        async with daemon(place, callers=callers, apart=True, addresses=addresses) as served:
            one, other = (Daemon(place, served.book, Links(where, LONG + x)) for x in ("", "b"))
            own = {**TRUE, "policy": {"name": "own"}}
            with pytest.raises(SandboxError, match=r"members\.a: a policy of one's own"):
                await one.ask("POST", "/v1/groups?wait=1", members(a=own))
            async with started(served, members(a=WAITS) | {"id": "g"}):
                for path in ("/v1/groups/g", "/v1/jobs/g.a"):
                    with pytest.raises(SandboxError, match="no such"):
                        await one.ask("GET", path)
                with pytest.raises(SandboxError, match="no such group"):
                    await one.ask("DELETE", "/v1/groups/g")
                view = await one.ask("POST", "/v1/groups?wait=1", members(a=TRUE) | {"id": "g"})
                assert view["members"]["a"]["status"] == "ok"  # an id of its own
            async with trio.open_nursery() as nursery:
                for caller in (one, other):
                    body = members(a=TRUE, b=TRUE)
                    nursery.start_soon(caller.ask, "POST", "/v1/groups?wait=1", body)
            await one.links.close()
            await other.links.close()


async def test_a_slow_reader_loses_nothing() -> None:
    count = 200_000
    body = members(a={"argv": ["seq", str(count)]}, b={"argv": ["echo", "x"]})
    async with daemon() as served:
        data = json.dumps(body).encode()
        async with served.links.asking("POST", "/v1/groups?wait=1", data, NDJSON) as answer:
            await trio.sleep(0.5)
            lines = (await answer.body()).splitlines()
        found = [json.loads(line) for line in lines]
        said = "".join(one["data"] for one in found
                       if one["type"] == "stdout" and one["member"] == "a")  # fmt: skip
        assert said == "".join(f"{number}\n" for number in range(1, count + 1))
        assert found[-1]["type"] == "end"


async def test_errors_of_a_client_are_a_runners() -> None:
    broken = Policy(mounts=(Mount(target="/x", source="/no/such/place"),))
    async with daemon() as served, sandboxd.connect(served.url) as client:
        with pytest.raises(PolicyError, match="no policy 'nope'"):
            await client.run_group(Group(members={"a": Job(argv=["true"], policy="nope")}))
        two = {"a": Job(argv=["sleep", "1000"]), "b": Job(argv=["true"], policy=broken)}
        with pytest.raises(LaunchError, match="/no/such/place"):
            await client.run_group(Group(members=two))
        with pytest.raises(LaunchError, match="/no/such/place"):
            await client.run_pipeline(list(two.values()), [])
        with pytest.raises(JobError, match="3 jobs together"):
            await client.run_group(waiting("a", "b", "c"))
        with pytest.raises(JobError, match="use start_group"):
            await client.run_group(Group(members={"a": Job(argv=["cat"], stdin=None)}))


async def test_members_have_their_ids_and_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x").write_text("x")
    job = Job(argv=["sh", "-c", "cp in/x out"], files={"in": tmp_path / "in"}, collect=["out"],
              collect_to=tmp_path / "to", id="mine", policy=policy())  # fmt: skip
    async with daemon() as served, sandboxd.connect(served.url) as client:
        found = await client.run_group(Group(members={"a": Member(job=job)}))
        assert (tmp_path / "to/out").read_text() == "x"
        assert found["a"].job == "mine"
        assert (await served.ask("GET", "/v1/jobs/mine"))["status"] == "ok"
        with pytest.raises(SandboxError, match="there is a job 'mine'"):
            await client.run_group(Group(members={"a": Member(job=job)}))
