"""TLS on TCP: who is believed, who gets in and who that is. The authorities are made here."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

import sandboxd
from sandboxd import HostError, Job, SandboxError
from sandboxd.serve.address import Tcp, parse
from sandboxd.serve.callers import Callers, read_tokens
from sandboxd.serve.link import Links
from sandboxd.serve.plain import Plain
from sandboxd.serve.tls import Shown, Trust, name_of, of_client, of_daemon
from tests.serve.serving import ROOT, Daemon, daemon
from tests.serve.test_callers import LONG, free_port, tokens
from tests.supervise.variants import policy


@dataclasses.dataclass
class Files:
    """An authority, and what it has signed."""

    place: Path
    authority: trustme.CA

    @property
    def ca(self) -> Path:
        file = self.place / "ca.pem"
        self.authority.cert_pem.write_to_path(file)
        return file

    def issue(self, name: str, **more: Any) -> tuple[Path, Path]:
        """A certificate's chain, and its key."""
        made = self.authority.issue_cert(name, **more)
        chain, key = self.place / f"{name}.pem", self.place / f"{name}.key"
        for number, part in enumerate(made.cert_chain_pems):
            part.write_to_path(chain, append=number > 0)
        key.touch(mode=0o600)
        made.private_key_pem.write_to_path(key)
        return chain, key

    def caller(self, name: str) -> Trust:
        chain, key = self.issue(f"{name}.example", common_name=name)
        return Trust(ca=self.ca, cert=chain, key=key)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path, trustme.CA())


@asynccontextmanager
async def served(files: Files, *, asks: bool = False, **changes: Any) -> AsyncIterator[Daemon]:
    """A daemon on https://localhost; `asks` for certificates."""
    cert, key = files.issue("localhost")
    shown = Shown(cert=cert, key=key, client_ca=files.ca if asks else None)
    where = Tcp("localhost", free_port(), tls=True)
    given: dict[str, Any] = {"callers": Callers(uids=frozenset(), certificates=asks)}
    async with daemon(addresses=[where], tls=shown, **{**given, **changes}) as one:
        one.links = Links(where, None, Trust(ca=files.ca))
        try:
            yield one
        finally:
            await one.links.close()


def url(one: Daemon) -> str:
    return str(one.links.address)


async def test_jobs_go_over_it_and_large_files(files: Files) -> None:
    async with served(files) as one:
        async with sandboxd.connect(url(one), trust=Trust(ca=files.ca)) as client:
            data = os.urandom(3_000_000)
            job = Job(argv=["sh", "-c", "cat > a"], stdin=data, collect=["a"], policy="base")
            assert (await client.run(job)).artifacts[0].data == data
            async with client.start(Job(argv=["cat"], stdin=None)) as run:
                assert run.stdin is not None
                await run.events.receive()
                await run.stdin.send_all(b"x")
                assert (await run.events.receive()).data == b"x"
        plain = Plain(one.links.address, trust=Trust(ca=files.ca))
        info = await trio.to_thread.run_sync(plain.ask, "GET", "/v1/info")
        assert info["caller"] == "tcp"


async def test_closing_it_cancels_the_job(files: Files) -> None:
    async with served(files) as one, sandboxd.connect(url(one), trust=Trust(ca=files.ca)) as client:
        with trio.move_on_after(0.5):
            await client.run(Job(argv=["sleep", "100"]))
        while (await client.info()).running:
            pass


async def test_a_daemon_of_another_authority_or_name_is_not_believed(files: Files) -> None:
    other = Files(files.place, trustme.CA())
    async with served(files) as one:
        wrong = [Trust(ca=other.ca), Trust()]
        for trust in wrong:
            with pytest.raises(HostError, match="certificate"):
                async with sandboxd.connect(url(one), trust=trust):
                    pass
            plain = Plain(one.links.address, trust=trust)
            with pytest.raises(HostError, match="certificate"):
                await trio.to_thread.run_sync(plain.ask, "GET", "/healthz")
        elsewhere = url(one).replace("localhost", "127.0.0.1")
        with pytest.raises(HostError, match=r"127\.0\.0\.1"):
            async with sandboxd.connect(elsewhere, trust=Trust(ca=files.ca)):
                pass


async def test_a_caller_is_who_its_certificate_names(files: Files) -> None:
    ann, bob = files.caller("ann"), files.caller("bob")
    async with served(files, asks=True, apart=True) as one:
        async with sandboxd.connect(url(one), trust=ann) as client:
            assert (await client.info()).caller == "tls:ann"
            assert (await client.run(Job(argv=["true"], id="x"))).ok
            with pytest.raises(SandboxError, match="the daemon's own user"):
                await client.run(Job(argv=["true"], policy=policy()))
        async with sandboxd.connect(url(one), trust=bob) as client:
            assert (await client.info()).caller == "tls:bob"
            assert (await client.run(Job(argv=["true"], id="x"))).ok  # its own x


async def test_who_has_no_certificate_or_anothers_does_not_get_in(files: Files) -> None:
    strange = Files(files.place, trustme.CA()).caller("eve")
    async with served(files, asks=True) as one:
        for trust in (Trust(ca=files.ca), dataclasses.replace(strange, ca=files.ca)):
            with pytest.raises(HostError):
                async with sandboxd.connect(url(one), trust=trust):
                    pass
        assert one.book.metrics.requests.values == {}


async def test_what_is_no_handshake_is_hung_up_on(files: Files) -> None:
    async with served(files) as one:
        assert isinstance(one.links.address, Tcp)
        for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 100, b""):
            async with await trio.open_tcp_stream("localhost", one.links.address.port) as stream:
                await stream.send_all(data)
                await stream.send_eof()
                said = b"".join([piece async for piece in stream])
                assert b"HTTP" not in said
        assert (await one.ask("GET", "/v1/info"))["caller"] == "tcp"


async def test_tokens_and_certificates_together(files: Files, tmp_path: Path) -> None:
    known = read_tokens(tokens(tmp_path, f"ann {LONG}\n"))
    callers = Callers(uids=frozenset(), tokens=known, certificates=True)
    bob = files.caller("bob")
    async with served(files, asks=True, callers=callers) as one:
        async with sandboxd.connect(url(one), trust=bob, token=LONG) as client:
            assert (await client.info()).caller == "token:ann"
        async with sandboxd.connect(url(one), trust=bob) as client:
            assert (await client.info()).caller == "tls:bob"
        with pytest.raises(SandboxError, match="no token that is known"):
            async with sandboxd.connect(url(one), trust=bob, token="x" * 20):
                pass


async def test_where_other_machines_reach_it_it_asks_for_certificates(files: Files) -> None:
    cert, key = files.issue("localhost")
    everywhere = Tcp("0.0.0.0", free_port(), tls=True)
    nobody = Callers(uids=frozenset())
    with pytest.RaisesGroup(pytest.RaisesExc(HostError, match="reached from elsewhere")):
        async with daemon(addresses=[everywhere], tls=Shown(cert=cert, key=key), callers=nobody):
            pass
    shown = Shown(cert=cert, key=key, client_ca=files.ca)
    async with daemon(addresses=[everywhere], tls=shown, callers=nobody):
        pass
    plain = dataclasses.replace(everywhere, tls=False)
    with pytest.RaisesGroup(pytest.RaisesExc(HostError, match="reached from elsewhere")):
        async with daemon(addresses=[plain], tls=shown, callers=nobody):
            pass
    here = Tcp("localhost", free_port(), tls=True)
    with pytest.RaisesGroup(pytest.RaisesExc(HostError, match="no certificate to show")):
        async with daemon(addresses=[here], callers=nobody):
            pass


def test_files_that_are_none(files: Files) -> None:
    cert, key = files.issue("localhost")
    key.chmod(0o644)
    with pytest.raises(HostError, match="others may read"):
        of_daemon(Shown(cert=cert, key=key))
    key.chmod(0o600)
    with pytest.raises(HostError, match="No such file"):
        of_daemon(Shown(cert=files.place / "nothing", key=key))
    for wrong in (Shown(cert=key, key=key), Shown(cert=cert, key=key, client_ca=key)):
        with pytest.raises(HostError):
            of_daemon(wrong)
    with pytest.raises(HostError):
        of_client(Trust(ca=key))


def test_a_name_that_is_none_is_its_digest() -> None:
    named = {"subject": ((("commonName", "ann"),),)}
    assert name_of(named, b"x") == "ann"
    two = {"subject": ((("commonName", "ann"),), (("commonName", "bob"),))}
    for odd in ({}, two, {"subject": ((("commonName", "a b\n"),),)}):
        assert len(name_of(odd, b"x")) == 64


def test_addresses() -> None:
    assert parse("https://h") == Tcp("h", 8686, tls=True)
    assert str(parse("https://[::1]:1")) == "https://[::1]:1"


def test_from_the_shell(files: Files) -> None:
    cert, key = files.issue("localhost")
    ann = files.caller("ann")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    words = ["--listen", f"https://localhost:{port}", "--state", f"{files.place}/state"]
    words += ["--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(files.ca)]
    program = [sys.executable, "-P", "-m", "sandboxd"]
    process = subprocess.Popen([*program, "serve", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        env = {
            **os.environ,
            "SANDBOXD_HOST": f"https://localhost:{port}",
            "SANDBOXD_TLS_CA": str(ann.ca),
            "SANDBOXD_TLS_CERT": str(ann.cert),
            "SANDBOXD_TLS_KEY": str(ann.key),
        }
        while True:
            done = subprocess.run(
                [*program, "submit", "--", "true"], cwd=ROOT, env=env, check=False,
                capture_output=True,
            )  # fmt: skip
            if not done.returncode:
                break
            assert process.poll() is None
            assert b"no daemon" in done.stderr, done.stderr
    finally:
        process.terminate()
        process.wait(60)
    with_half = subprocess.run(
        [*program, "serve", "--tls-cert", str(cert)], cwd=ROOT, check=False, capture_output=True
    )
    assert with_half.returncode == 1
    assert b"belong together" in with_half.stderr
