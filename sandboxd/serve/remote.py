"""One run of a daemon's as its caller sees it: events, stdin, files, and the hands on it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path

import msgspec
import trio

from sandboxd.errors import SandboxError
from sandboxd.job import Job
from sandboxd.result import Artifact, Event, Result, Usage
from sandboxd.serve.link import Links
from sandboxd.serve.problems import is_closed
from sandboxd.supervise.leavings import Contents, OpenArtifacts
from sandboxd.supervise.run import EVENTS_BUFFER


class Stdin(trio.abc.SendStream):
    """What an interactive job reads."""

    def __init__(self, links: Links, job: str) -> None:
        self._links = links
        self._target = f"/v1/jobs/{job}/stdin"
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        try:
            async with self._links.asking("POST", self._target, bytes(data)) as answer:
                await answer.body()
        except SandboxError as error:
            if is_closed(error):
                raise trio.BrokenResourceError(str(error)) from None
            raise

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        await self._links.quietly("POST", f"{self._target}?eof=1", b"")


class Fetched:
    """Collected files that are asked for one after the other; each is in a file without a name."""

    def __init__(self, links: Links) -> None:
        self.records: Mapping[bytes, Artifact] = {}
        self.closed = False
        self._links = links
        self._open: set[int] = set()

    async def reopen(self, names: list[bytes]) -> Contents:
        found: Contents = {}
        for name in names:
            record = self.records[name]
            with tempfile.TemporaryFile() as file:
                target = f"/v1/files/{record.sha256}"
                async with self._links.asking("GET", target) as answer, aclosing(answer.pieces):
                    async for piece in answer.pieces:
                        await trio.to_thread.run_sync(file.write, piece)
                file.flush()
                number = os.dup(file.fileno())
            self._open.add(number)
            found[name] = b"", number
        return found

    def let_go(self, number: int) -> None:
        if number in self._open:
            self._open.remove(number)
            os.close(number)

    def close(self) -> None:
        self.closed = True
        for number in list(self._open):
            self.let_go(number)


class ClientRun:
    """One run in progress, as supervise.run.Run is."""

    def __init__(self, job: str, links: Links, nursery: trio.Nursery, *, feeds: bool) -> None:
        self.id = job
        self.stdin: trio.abc.SendStream | None = Stdin(links, job) if feeds else None
        self._send, self.events = trio.open_memory_channel[Event](EVENTS_BUFFER)
        self._links = links
        self._nursery = nursery
        self._done = trio.Event()
        self._usage: Usage | None = None
        self._result: Result | None = None
        self._error: SandboxError | None = None
        self._error_told = False
        self._deaf = False
        self._collect_to: Path | str = "memory"
        self._fetched = Fetched(links)
        self._artifacts = OpenArtifacts(self._collected)

    @classmethod
    def _of(cls, job: Job, name: str, links: Links, nursery: trio.Nursery) -> ClientRun:
        """The run of a job that the daemon calls so."""
        run = cls(name, links, nursery, feeds=job.stdin is None or job.terminal is not None)
        run._collect_to = job.collect_to
        if job.collect_to == "stream":
            run._artifacts.leavings = run._fetched
        return run

    def kill(self) -> None:
        """End it; its status will be `cancelled`."""
        self._soon("DELETE", f"/v1/jobs/{self.id}", None)

    def _soon(self, method: str, target: str, body: bytes | None) -> None:
        if not self._done.is_set():
            self._nursery.start_soon(self._links.quietly, method, target, body)

    async def _signal(self, name: str, **more: int) -> None:
        body = msgspec.json.encode({"signal": name, **more})
        async with self._links.asking("POST", f"/v1/jobs/{self.id}/signal", body) as answer:
            await answer.body()

    def usage(self) -> Usage:
        """What the last event of type `usage` said; SandboxError if there was none yet."""
        if self._usage is None:
            raise SandboxError("no usage yet", hint="Client.start(job, usage_every=...)")
        return self._usage

    async def pause(self) -> None:
        """Freeze the whole run; HostError where the daemon has no cgroup for it."""
        await self._signal("STOP")

    def resume(self) -> None:
        """Let it go on."""
        body = msgspec.json.encode({"signal": "CONT"})
        target = f"/v1/jobs/{self.id}/signal"
        self._soon("POST", target, body)

    def resize(self, rows: int, columns: int) -> None:
        """Tell the job's terminal its new size."""
        body = msgspec.json.encode({"signal": "WINCH", "rows": rows, "columns": columns})
        target = f"/v1/jobs/{self.id}/signal"
        self._soon("POST", target, body)

    def artifacts(self) -> OpenArtifacts:
        """Each collected file, open, once the run is over (collect_to="stream")."""
        return self._artifacts

    def _end(self, error: SandboxError | None = None) -> None:
        """There is nothing more to come."""
        if not self._done.is_set():
            self._error = self._error or error
            self._done.set()
            self._send.close()

    def _leave(self) -> None:
        self.events.close()
        self._fetched.close()

    async def _collected(self) -> tuple[Artifact, ...]:
        found = await self.wait()
        if found.artifacts and self._artifacts.leavings is None:
            raise SandboxError("the artifacts are elsewhere", hint='collect_to="stream" in the job')
        refused = {one.path for one in found.artifact_errors}
        return tuple(one for one in found.artifacts if one.path not in refused)

    async def wait(self) -> Result:
        """The result. Someone must read `events` meanwhile."""
        await self._done.wait()
        if self._error is not None:
            self._error_told = True
            raise self._error
        if self._result is None:
            raise SandboxError("the run was left before it ended", hint="wait inside the block")
        return self._result
