"""`sandboxd serve --compat`: the listener on TCP, its flags, and who gets in."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import trio

from sandboxd.serve.link import Links
from tests.serve.gojudging import STDERR, STDOUT, cmd, sh, talked
from tests.serve.serving import ROOT, folder, process


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=50) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.needs("userns")
async def test_on_tcp(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("input")
    port = free_port()
    with folder() as place:
        flags = ("--compat", f"go-judge=127.0.0.1:{port}", "--compat-src", str(tmp_path))
        with process(place, *flags) as served:
            await (await served.links()).close()
            url = f"http://127.0.0.1:{port}"
            files = [{"src": f"{tmp_path}/in"}, STDOUT, STDERR]
            status, found = ask(f"{url}/run", {"cmd": [cmd("cat", files=files)]})
            assert (status, found[0]["files"]["stdout"]) == (200, "input")
            # No page in a browser is a caller, by whatever name it has us.
            for header in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
                assert ask(f"{url}/run", {"cmd": []}, **header)[0] == 403
        assert not served.errors()


@pytest.mark.needs("userns")
async def test_a_token_where_there_are_tokens() -> None:
    port = free_port()
    with folder() as place:
        tokens = place / "tokens"
        tokens.write_text("judge 0123456789abcdef\n")
        tokens.chmod(0o600)
        flags = ("--compat", f"go-judge=127.0.0.1:{port}", "--token-file", str(tokens))
        with process(place, *flags) as served:
            await (await served.links()).close()
            url = f"http://127.0.0.1:{port}"
            assert ask(f"{url}/version")[0] == 200
            assert ask(f"{url}/file")[0] == 401
            assert ask(f"{url}/file", Authorization="Bearer 0123456789abcdef") == (200, {})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compat", "piston=127.0.0.1:2000"], "is not go-judge=HOST:PORT"),
        (["--compat", "go-judge="], "is not go-judge=HOST:PORT"),
        (["--compat-src", "/"], "--compat-src without --compat"),
        (["--compat", "go-judge=127.0.0.1:1", "--compat", "go-judge=127.0.0.1:2"], "twice"),
        (["--overseer", "nobody"], "--overseer nobody: no such name"),
        (["--compat", "go-judge=0.0.0.0:5050"], "can be reached from elsewhere"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], said: str) -> None:
    with folder() as place:
        where = ("--state", f"{place}/state", "--listen", f"unix://{place}/s")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sandboxd", "serve", *where, *flags],
            cwd=ROOT, capture_output=True, text=True, timeout=50, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.needs("userns")
async def test_what_ran_is_answered_when_the_daemon_goes_down() -> None:
    port = free_port()
    asked = {"requestId": "a", "cmd": [sh("sleep 1; echo x > out", copyOutCached=["out"])]}
    with folder() as place:
        flags = ("--compat", f"go-judge=127.0.0.1:{port}", "--drain", "30")
        with process(place, *flags) as served:
            links = await served.links()
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with talked(stream, "/ws") as talk:
                await talk.say(asked)
                while (await overview(links))["running"] == 0:
                    pass
                served.process.send_signal(signal.SIGTERM)
                assert (await talk.hear_json())["results"][0]["status"] == "Accepted"
            await links.close()
            assert await trio.to_thread.run_sync(served.process.wait) == 0


async def overview(links: Links) -> dict[str, Any]:
    async with links.asking("GET", "/v1/overview") as answer:
        return dict(await answer.json())
