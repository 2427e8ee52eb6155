"""A daemon in this process, and one in a process of its own; and raw bytes to talk to either."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from sandboxd.serve.address import Unix
from sandboxd.serve.book import Book, Settings
from sandboxd.serve.callers import Callers
from sandboxd.serve.link import Links
from sandboxd.serve.quotas import Quotas
from sandboxd.serve.room import room
from sandboxd.serve.server import Options, serve

ROOT = Path(__file__).resolve().parent.parent.parent
TRUE = {"argv": ["true"]}


@contextmanager
def folder() -> Iterator[Path]:
    """A directory whose name is short enough for a socket in it."""
    place = Path(tempfile.mkdtemp(prefix="d"))
    try:
        yield place
    finally:
        shutil.rmtree(place)


@dataclasses.dataclass
class Daemon:
    """One that runs; `links` is a client of it without any wisdom."""

    place: Path
    book: Book
    links: Links

    @property
    def url(self) -> str:
        return f"unix://{self.place}/s"

    async def ask(
        self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Any:
        """The JSON of an answer; problems are exceptions."""
        data = None if body is None else json.dumps(body).encode()
        async with self.links.asking(method, target, data, headers) as answer:
            return await answer.json()

    async def submit(self, **job: Any) -> str:
        """The id of a job that is accepted."""
        view = await self.ask("POST", "/v1/jobs", job)
        return str(view["id"])

    async def ended(self, job: str) -> dict[str, Any]:
        """The job, once it is over."""
        while (view := await self.ask("GET", f"/v1/jobs/{job}?wait=60"))["state"] != "done":
            pass
        return dict(view)

    async def events(self, job: str, query: str = "") -> list[dict[str, Any]]:
        async with self.links.asking("GET", f"/v1/jobs/{job}/events{query}") as answer:
            return [json.loads(line) for line in (await answer.body()).splitlines()]


def options(place: Path, **changes: Any) -> Options:
    """Of a daemon in this directory; quotas and settings by their names."""
    quotas = {one.name for one in dataclasses.fields(Quotas)} & changes.keys()
    settings = {one.name for one in dataclasses.fields(Settings)} & changes.keys()
    given: dict[str, Any] = {"quotas": Quotas(**{name: changes.pop(name) for name in quotas})}
    given |= {name: changes.pop(name) for name in settings}
    given = {"state": place / "state", "room": room(4, 1 << 40), **given}
    made = Settings(**given)
    common: dict[str, Any] = {
        "settings": made,
        "addresses": [Unix(place / "s")],
        "callers": Callers(uids=frozenset({os.getuid()})),
        "slots": 2,
    }
    return Options(**{**common, **changes})


@asynccontextmanager
async def daemon(place: Path | None = None, **changes: Any) -> AsyncIterator[Daemon]:
    """A daemon; leaving the block cancels it."""
    with folder() as made:
        place = place or made
        async with trio.open_nursery() as nursery:
            opened, book = trio.Event(), list[Book]()

            def ready(found: Book) -> None:
                book.append(found)
                opened.set()

            async def run() -> None:
                await serve(options(place, **changes), ready=ready)

            nursery.start_soon(run)
            await opened.wait()
            links = Links(Unix(place / "s"), None)
            try:
                yield Daemon(place, book[0], links)
            finally:
                await links.close()
            nursery.cancel_scope.cancel()


async def raw(place: Path, *pieces: bytes) -> bytes:
    """What a daemon says to these bytes, up to where it hangs up; our side stays open."""
    async with await trio.open_unix_socket(str(place / "s")) as stream:
        for piece in pieces:
            await stream.send_all(piece)
        return b"".join([data async for data in stream])


def head(data: bytes) -> int:
    """The status of the first answer."""
    return int(data.split(b" ", 2)[1])


# -- in a process of its own -----------------------------------------------------------------


class Process:
    """`sandboxd serve`, to be killed."""

    def __init__(self, place: Path, *flags: str) -> None:
        self.place = place
        self._argv = [
            *(sys.executable, "-P", "-m", "sandboxd", "serve", "--state", str(place / "state")),
            *("--listen", f"unix://{place}/s", "--slots", "2", "--log-level", "warning"),
            *("--drain", "0.5", *flags),
        ]
        self._errors = place / "errors"
        self.start()

    def start(self) -> None:
        with self._errors.open("ab") as errors:
            self.process = subprocess.Popen(self._argv, cwd=ROOT, stderr=errors)

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def errors(self) -> str:
        return self._errors.read_text()

    async def links(self) -> Links:
        """A client, once it answers."""
        links = Links(Unix(self.place / "s"), None)
        deadline = time.monotonic() + 60
        while True:
            try:
                async with links.asking("GET", "/readyz") as answer:
                    await answer.body()
                return links
            except Exception:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self.errors()) from None
                await trio.sleep(0.02)


@contextmanager
def process(place: Path, *flags: str) -> Iterator[Process]:
    found = Process(place, *flags)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.kill(signal.SIGTERM)
