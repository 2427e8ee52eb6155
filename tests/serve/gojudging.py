"""A daemon that speaks go-judge's protocol, and somebody who speaks it to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
from wsproto import ConnectionType, WSConnection
from wsproto import events as ws

from sandboxd.serve.address import Unix
from sandboxd.serve.link import Links
from sandboxd.serve.server import GoJudgeOptions
from tests.serve.serving import Daemon, daemon, folder

SECOND = 10**9
PATH = "PATH=/usr/bin:/bin"
STDOUT, STDERR = {"name": "stdout", "max": 10240}, {"name": "stderr", "max": 10240}


def cmd(*args: str, **more: Any) -> dict[str, Any]:
    """A program as callers of go-judge write it."""
    return {
        "args": [*args],
        "env": [PATH],
        "files": [{"content": more.pop("stdin", "")}, STDOUT, STDERR],
        "cpuLimit": 10 * SECOND,
        "clockLimit": 20 * SECOND,
        "memoryLimit": 256 << 20,
        "procLimit": 50,
        **more,
    }


def sh(script: str, **more: Any) -> dict[str, Any]:
    return cmd("sh", "-c", script, **more)


@dataclasses.dataclass
class Judge:
    """The listener; `links` is a client of it."""

    daemon: Daemon
    socket: Path
    links: Links

    async def ask(
        self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body, whatever they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return await answer(self.links, (method, target, headers or {}), data)

    async def run(self, *cmds: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
        status, headers, body = await self.ask("POST", "/run", {"cmd": cmds, **more})
        assert status == 200, body
        assert headers["content-type"] == "application/json; charset=utf-8"
        found = json.loads(body)
        assert isinstance(found, list)
        return found

    async def refused(self, body: Any) -> tuple[int, str]:
        status, _, said = await self.ask("POST", "/run", body)
        text = json.loads(said)
        assert isinstance(text, str)
        return status, text


async def answer(
    links: Links, head: tuple[str, str, dict[str, str]], body: bytes | None
) -> tuple[int, dict[str, str], bytes]:
    """What `Links.asking` makes an exception of, as it is."""
    link = await links._open()
    async with link.stream:
        found = await links._ask(link, head, body)
        return found.status, dict(found.headers), await found.body()


@asynccontextmanager
async def judge(*, local: Sequence[Path] = (), **changes: Any) -> AsyncIterator[Judge]:
    with folder() as place:
        socket = place / "g"
        options = GoJudgeOptions(address=Unix(socket), local=local)
        async with daemon(place, gojudge=options, **changes) as served:
            links = Links(Unix(socket), None)
            try:
                yield Judge(served, socket, links)
            finally:
                await links.close()


class Talk:
    """A WebSocket, the client's side."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.machine = WSConnection(ConnectionType.CLIENT)
        self._events: list[ws.Event] = []
        self._pieces: list[Any] = []

    async def say(self, data: bytes | str | dict[str, Any]) -> None:
        """A binary message, a text, or JSON as text."""
        if isinstance(data, dict):
            data = json.dumps(data)
        if isinstance(data, bytes):
            await self.stream.send_all(self.machine.send(ws.BytesMessage(data=data)))
        else:
            await self.stream.send_all(self.machine.send(ws.TextMessage(data=data)))

    async def event(self) -> ws.Event:
        while not self._events:
            data = await self.stream.receive_some(65536)
            self.machine.receive_data(data or None)
            self._events += self.machine.events()
            if not data and not self._events:
                raise EOFError
        return self._events.pop(0)

    async def hear(self) -> Any:
        """The next whole message; EOFError at the end, with the code of it."""
        while True:
            event = await self.event()
            if isinstance(event, ws.CloseConnection):
                raise EOFError(int(event.code))
            if isinstance(event, ws.TextMessage | ws.BytesMessage):
                self._pieces.append(event.data)
                if event.message_finished:
                    pieces, self._pieces = self._pieces, []
                    return "".join(pieces) if isinstance(event.data, str) else b"".join(pieces)

    async def hear_json(self) -> Any:
        return json.loads(await self.hear())


@asynccontextmanager
async def talking(socket: Path, path: str) -> AsyncIterator[Talk]:
    """A WebSocket that was accepted."""
    async with talked(await trio.open_unix_socket(str(socket)), path) as talk:
        yield talk


@asynccontextmanager
async def talked(stream: trio.SocketStream, path: str) -> AsyncIterator[Talk]:
    """The same on a connection that there is."""
    async with stream:
        talk = Talk(stream)
        await stream.send_all(talk.machine.send(ws.Request(host="localhost", target=path)))
        assert isinstance(await talk.event(), ws.AcceptConnection)
        yield talk
