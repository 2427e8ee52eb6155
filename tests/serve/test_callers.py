"""Who is let in, and what each of them sees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandboxd.errors import HostError, SandboxError
from sandboxd.policy import Policy
from sandboxd.serve.address import Tcp, Unix
from sandboxd.serve.callers import Callers, is_loopback, read_tokens
from sandboxd.serve.http import Peer
from sandboxd.serve.link import Links
from sandboxd.serve.wire import Refusal
from tests.serve.serving import daemon, folder

LONG = "0123456789abcdef"


def tokens(place: Path, text: str, mode: int = 0o600) -> Path:
    file = place / "tokens"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_the_kernel_says_which_uid_it_is() -> None:
    callers = Callers(uids=frozenset({os.getuid(), 7}))
    own, other = callers.find(Peer(uid=os.getuid()), {}), callers.find(Peer(uid=7), {})
    assert (own.name, own.operator) == (f"uid:{os.getuid()}", True)
    assert (other.name, other.operator) == ("uid:7", False)
    with pytest.raises(Refusal, match="uid 8 may not") as refused:
        callers.find(Peer(uid=8), {})
    assert refused.value.status == 403


def test_a_token_has_a_name(tmp_path: Path) -> None:
    found = read_tokens(tokens(tmp_path, f"# these\nann {LONG}\n\nbob  {LONG}b\n"))
    callers = Callers(uids=frozenset(), tokens=found)
    peer = Peer(address="10.0.0.1")
    for name, token in (("ann", LONG), ("bob", LONG + "b")):
        assert callers.find(peer, {"authorization": f"Bearer {token}"}).name == f"token:{name}"
    for wrong in ("", LONG, f"Basic {LONG}", f"Bearer {LONG}x", "Bearer ", "Bearer \xff"):
        with pytest.raises(Refusal) as refused:
            callers.find(peer, {"authorization": wrong})
        assert refused.value.status == 401
        assert ("WWW-Authenticate", "Bearer") in refused.value.headers


@pytest.mark.parametrize(
    "text",
    ["", "ann\n", "ann short\n", f"a b {LONG}\n", f"ann {LONG}\nann {LONG}1\n", f"- {LONG}\n"],
)
def test_a_token_file_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(HostError, match="token"):
        read_tokens(tokens(tmp_path, text))


def test_a_token_file_that_others_may_read(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="others may read") as wrong:
        read_tokens(tokens(tmp_path, f"ann {LONG}\n", 0o640))
    assert "chmod 600" in wrong.value.hint
    with pytest.raises(HostError, match="No such file"):
        read_tokens(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("127.0.0.5", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_what_counts_as_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


async def test_an_address_that_others_reach_needs_tokens() -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(HostError, match="reached from elsewhere")):
        async with daemon(addresses=[Tcp("0.0.0.0", 0)]):
            pass


async def test_a_page_in_a_browser_does_not_get_in() -> None:
    callers = Callers(uids=frozenset())
    for host in ("localhost:8686", "127.0.0.1", "[::1]:1"):
        assert callers.find(Peer(address="127.0.0.1"), {"host": host}).name == "tcp"
    for headers in ({"host": "evil.example"}, {"host": "localhost", "origin": "http://x"}, {}):
        with pytest.raises(Refusal) as refused:
            callers.find(Peer(address="127.0.0.1"), headers)
        assert refused.value.status == 403


async def test_callers_do_not_see_each_other(tmp_path: Path) -> None:
    found = read_tokens(tokens(tmp_path, f"ann {LONG}a\nbob {LONG}b\n"))
    callers = Callers(uids=frozenset({os.getuid()}), tokens=found)
    where = Tcp("127.0.0.1", free_port())
    async with daemon(addresses=[where], callers=callers) as served:
        ann, bob = Links(where, LONG + "a"), Links(where, LONG + "b")
        try:
            served.links = ann
            job = await served.submit(argv=["echo", "secret"], id="x")
            await served.ended(job)
            digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
            async with ann.asking("PUT", f"/v1/files/{digest}", b"") as answer:
                await answer.body()
            served.links = bob
            for target in ("/v1/jobs/x", "/v1/jobs/x/events", f"/v1/files/{digest}"):
                with pytest.raises(SandboxError, match=r"no such job|no file"):
                    await served.ask("GET", target)
            assert (await served.ask("GET", "/v1/jobs"))["jobs"] == []
            await served.submit(argv=["true"], id="x")  # nor is the name taken
            policy = {"limits": {"wall_time": 1.0}}
            with pytest.raises(SandboxError, match="the daemon's own user"):
                await served.submit(argv=["true"], policy=policy)
            with pytest.raises(SandboxError, match="the daemon's own user"):
                await served.submit(argv=["true"], keep_root="mine")
            served.links = Links(where, None)
            with pytest.raises(SandboxError, match="no token"):
                await served.ask("GET", "/v1/info")
        finally:
            await ann.close()
            await bob.close()


async def test_the_operator_may_bring_a_policy() -> None:
    assert Policy().name == "custom"
    async with daemon() as served:
        policy = {"limits": {"wall_time": 0.2}, "environment": {"set": {"PATH": "/usr/bin"}}}
        view = await served.ask(
            "POST", "/v1/jobs?wait=1", {"argv": ["sleep", "9"], "policy": policy}
        )
        assert view["status"] == "wall_time_limit"


async def test_the_socket_is_the_users_own() -> None:
    async with daemon() as served:
        assert (served.place / "s").stat().st_mode & 0o777 == 0o600
        assert (served.place / "state").stat().st_mode & 0o077 == 0


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def test_metrics_are_ones_own_and_an_overseers_everybodys() -> None:
    port = free_port()
    with folder() as place:
        known = read_tokens(tokens(place, f"ann {LONG}\nbob {LONG}b\neve {LONG}e\n"))
        me = frozenset({os.getuid()})
        callers = Callers(uids=me, tokens=known, overseers=frozenset({"eve"}))
        async with daemon(
            place, addresses=[Unix(place / "s"), Tcp("127.0.0.1", port)], callers=callers
        ) as served:

            async def metrics(links: Links) -> set[str]:
                async with links.asking("GET", "/metrics") as answer:
                    return set((await answer.body()).decode().splitlines())

            by_name = {
                name: Links(Tcp("127.0.0.1", port), token)
                for name, token in (("ann", LONG), ("bob", f"{LONG}b"), ("eve", f"{LONG}e"))
            }
            body = b'{"argv": ["true"]}'
            for name in ("ann", "ann", "bob"):
                async with by_name[name].asking("POST", "/v1/jobs?wait=1", body) as answer:
                    await answer.body()
            told = {name: await metrics(links) for name, links in by_name.items()}
            told["me"] = await metrics(served.links)
            for links in by_name.values():
                await links.close()
    for name, count in (("ann", 2), ("bob", 1), ("eve", 3), ("me", 3)):
        assert f'sandboxd_jobs_ended_total{{status="ok"}} {count}' in told[name]
        assert f"sandboxd_queue_seconds_count {count}" in told[name]
        assert "sandboxd_slots 2" in told[name]
        for line in (
            'sandboxd_caller_jobs_ended_total{caller="token:ann",status="ok"} 2',
            'sandboxd_caller_jobs_running{caller="token:bob"} 0',
            "# TYPE sandboxd_http_requests_total counter",
            "# TYPE sandboxd_spares gauge",
        ):
            assert (line in told[name]) == (name in ("eve", "me"))
    assert not any("caller" in line for line in told["ann"] | told["bob"])
