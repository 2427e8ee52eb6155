"""Two callers: neither sees anything of the other's, and their jobs share no user namespace."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

import sandboxd
from sandboxd import Job, SandboxError
from sandboxd.probe.host import probe
from sandboxd.serve.address import Tcp
from sandboxd.serve.api import ROUTES, Route
from sandboxd.serve.callers import Callers, read_tokens
from sandboxd.serve.link import Links
from sandboxd.supervise.domains import Domains
from tests.serve.serving import Daemon, daemon, folder
from tests.serve.test_callers import LONG, free_port, tokens
from tests.supervise.variants import policy

ENDING = {
    *("events", "batch_events", "signal", "cancel", "cancel_batch"),
    *("cancel_group", "cancel_pipeline"),
}
"""Routes that end what they are about, or wait for its end."""
OWN = [route for route in ROUTES if "{" in route.path]
WAITS = {"argv": ["sleep", "100"]}
TOGETHER = {
    "group": ("/v1/groups", {"id": "x", "members": {"a": {"job": WAITS}}}),
    "pipeline": ("/v1/pipelines", {"id": "x", "jobs": [{**WAITS, "id": "own"}]}),
}
BODIES = {"signal": b'{"signal": "KILL"}', "stdin": b"x"}


@asynccontextmanager
async def two() -> AsyncIterator[tuple[Daemon, Links, Links]]:
    """A daemon, and a connection of ann and of bob."""
    with folder() as place:
        known = read_tokens(tokens(place, f"ann {LONG}\nbob {LONG}b\n"))
        callers, where = Callers(uids=frozenset(), tokens=known), Tcp("127.0.0.1", free_port())
        async with daemon(callers=callers, addresses=[where], apart=callers.many) as served:
            ann, bob = Links(where, LONG), Links(where, LONG + "b")
            try:
                yield served, ann, bob
            finally:
                await ann.close()
                await bob.close()


def outside(pid: int) -> set[int]:
    """The ids of this machine that a process can be."""
    rows = [line.split() for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines()]
    return {at for _, start, count in rows for at in range(int(start), int(start) + int(count))}


async def status(links: Links, route: Route, name: str) -> int:
    target = route.path.format(id=name, sha256=name)
    if route.name == "put_file":
        target = route.path.format(sha256=hashlib.sha256(b"x").hexdigest())
    try:
        async with links.asking(route.method, target, BODIES.get(route.name)) as answer:
            await answer.body()
            return answer.status
    except SandboxError as error:
        return 404 if str(error).startswith("no ") else 1


@pytest.mark.parametrize("route", [one for one in OWN if one.name != "put_file"], ids=str)
async def test_what_is_anothers_is_as_what_is_not_there(route: Route) -> None:
    async with two() as (served, ann, bob), AsyncExitStack() as left:
        served.links = ann
        job = await served.submit(argv=["sleep", "100"], id="x", interactive=True)
        batch = {"id": "x", "job": {"argv": ["sleep", "100"]}, "cases": [{}]}
        await served.ask("POST", "/v1/batches", batch)
        digest = hashlib.sha256(b"secret").hexdigest()
        async with ann.asking("PUT", f"/v1/files/{digest}", b"secret"):
            pass
        if (what := route.name.removeprefix("cancel_")) in TOGETHER:
            path, body = TOGETHER[what]
            data, accept = msgspec.json.encode(body), {"Accept": "application/x-ndjson"}
            await left.enter_async_context(ann.asking("POST", f"{path}?wait=1", data, accept))
        name = digest if "sha256" in route.path else job
        assert await status(bob, route, name) == 404
        assert await status(bob, route, "0" * 64) == 404
        if route.name not in ENDING:
            assert await status(ann, route, name) in (200, 204)


async def test_that_somebody_has_a_file_is_not_told() -> None:
    async with two() as (served, ann, bob):
        digest = hashlib.sha256(b"secret").hexdigest()
        said = []
        for links in (ann, bob):
            async with links.asking("PUT", f"/v1/files/{digest}", b"secret") as answer:
                said.append((answer.status, await answer.body()))
        assert said[0] == said[1]
        served.links = bob
        other = hashlib.sha256(b"other").hexdigest()
        with pytest.raises(SandboxError, match="no file"):
            await served.submit(argv=["cat", "a"], files={"a": {"sha256": other}})


@pytest.mark.needs("subuid")
async def test_callers_have_user_namespaces_and_ids_of_their_own() -> None:
    async with two() as (served, ann, bob):
        for links in (ann, bob):
            served.links = links
            assert (await served.ask("GET", "/v1/info"))["tenant"] == "own"
            view = await served.ask("POST", "/v1/jobs?wait=1", {"argv": ["true"]})
            assert view["status"] == "ok"
            assert "tenant" not in [one["what"] for one in view["result"]["degraded"]]
        homes = list(served.book.runner._known.homes)
        living = [home.living for home in homes if home.living is not None]
        assert len(living) == 2
        assert len({os.readlink(one.user_namespace()) for one in living}) == 2
        mapped = [outside(one.pid) - {os.getuid()} for one in living]
        assert mapped[0]
        assert not mapped[0] & mapped[1]


@pytest.mark.needs("subuid")
async def test_more_callers_than_ids_are_told_so() -> None:
    host = probe()
    assert host.subuid is not None
    domains = Domains(host)
    room = host.subuid.count // 4096
    names = [str(number) for number in range(room + 1)]
    assert [bool(domains.why_not(name)) for name in names] == [False] * room + [True]
    assert not domains.why_not("0")
    async with sandboxd.open_runner(slots=1, host=host) as runner:
        for name in names[:-1]:
            runner.shares(name)
        result = await runner.run(Job(argv=["true"], policy=policy(), domain=names[-1]))
    told = {one.what: one.why for one in result.degraded}
    assert f"enough for {room} callers" in told["tenant"]


async def test_without_subordinate_ids_callers_share_one() -> None:
    host = msgspec.structs.replace(probe(), subuid=None, subgid=None)
    async with sandboxd.open_runner(slots=1, host=host) as runner:
        results = [await runner.run(Job(argv=["true"], domain=name)) for name in ("a", "b")]
        places = {os.readlink(one.living.user_namespace())
                  for one in runner._known.homes if one.living is not None}  # fmt: skip
    assert len(places) == 2
    for result in results:
        assert "tenant" in [one.what for one in result.degraded]
