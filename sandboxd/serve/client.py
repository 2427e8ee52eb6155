"""A Runner that is elsewhere: the same methods, carried out by a daemon."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio

from sandboxd.errors import JobError, SandboxError
from sandboxd.job import Job
from sandboxd.result import Artifact, Event, Result, Usage
from sandboxd.serve import address
from sandboxd.serve.link import Links
from sandboxd.serve.problems import is_closed
from sandboxd.serve.sending import submission_of
from sandboxd.serve.tls import Trust
from sandboxd.serve.wire import FASTEST, Info, error_of, event_of, result_of
from sandboxd.supervise.artifacts import check_place, save
from sandboxd.supervise.leavings import Contents, OpenArtifacts
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.run import EVENTS_BUFFER

NDJSON = "application/x-ndjson"


class Client:
    """Made by `connect`; may be used by many tasks at once."""

    def __init__(self, links: Links) -> None:
        self._links = links

    async def run(self, job: Job) -> Result:
        """Carry a job out. Cancelling it closes the connection, which ends the job."""
        if job.stdin is None:
            raise JobError("stdin=None: there is nobody to feed it", hint="use Client.start")
        if job.collect_to == "stream":
            raise JobError(
                'collect_to="stream": there is nobody to read it', hint="use Client.start"
            )
        check_place(job)
        body = msgspec.json.encode(await submission_of(job, self._store))
        async with self._links.asking("POST", "/v1/jobs?wait=1", body) as answer:
            view = await answer.json()
        return await self._result(view["result"], job.collect_to)

    @asynccontextmanager
    async def start(
        self, job: Job, *, usage_every: float | None = None
    ) -> AsyncIterator[ClientRun]:
        """Carry a job out while its events are read; leaving the block kills what is left."""
        if usage_every is not None and not FASTEST <= usage_every < math.inf:
            raise JobError(f"usage_every={usage_every!r}", hint=f"{FASTEST:g} seconds or more")
        check_place(job)
        wanted = await submission_of(job, self._store)
        wanted |= {"overflow": "stall", "usage_every": usage_every}
        body, headers = msgspec.json.encode(wanted), {"Accept": NDJSON}
        with one_error():
            async with (
                self._links.asking("POST", "/v1/jobs?wait=1", body, headers) as answer,
                trio.open_nursery() as nursery,
            ):
                name = answer.headers["location"].rpartition("/")[2]
                feeds = job.stdin is None or job.terminal is not None
                run = ClientRun(name, self._links, nursery, feeds=feeds)
                if job.collect_to == "stream":
                    run._artifacts.leavings = run._fetched = Fetched(self._links)
                run._collect_to = job.collect_to
                nursery.start_soon(self._follow, run, answer.pieces)
                try:
                    yield run
                finally:
                    run.events.close()
                    run._fetched.close()
                    nursery.cancel_scope.cancel()
            if run._error is not None and not run._error_told:
                raise run._error

    @asynccontextmanager
    async def batch(
        self, jobs: Sequence[Job], *, stop: Literal["never", "failure"] = "never"
    ) -> AsyncIterator[AsyncGenerator[Result | SandboxError, None]]:
        """Many jobs by one request: their results in their order, each as soon as it is there.

        An exception in place of a result is why there is none. With stop="failure" the jobs after
        one that is not `ok` are cancelled. Leaving the block cancels what is left.
        """
        cases = [await submission_of(job, self._store) for job in jobs]
        places = [job.collect_to for job in jobs]
        if "stream" in places or any(job.stdin is None for job in jobs):
            raise JobError("a batch has no run to read from, or to feed", hint="use Client.start")
        for job, case in zip(jobs, cases, strict=True):
            if case.pop("id", None) is not None or case.pop("keep_root", None) is not None:
                raise JobError("id and keep_root: not in a batch", hint="leave them out")
            case["cwd"] = case.get("cwd")
            if job.terminal is not None:
                raise JobError("terminal: not in a batch", hint="use Client.start")
        common = {"argv": cases[0]["argv"]} if cases else {}
        body = msgspec.json.encode({"job": common, "cases": cases, "stop": stop})
        async with (
            self._links.asking("POST", "/v1/batches?wait=1", body) as answer,
            aclosing(self._cases(answer.pieces, places)) as results,
        ):
            yield results

    async def _cases(
        self, pieces: AsyncGenerator[bytes, None], places: Sequence[Path | str]
    ) -> AsyncGenerator[Result | SandboxError, None]:
        async with aclosing(pieces), aclosing(_records(pieces)) as records:
            async for record in records:
                if record["type"] == "end":
                    return
                yield await self._case(record, places[record["seq"]])
        raise SandboxError("the daemon ended before the batch did", hint="submit it again")

    async def _case(self, record: Mapping[str, Any], to: Path | str) -> Result | SandboxError:
        if record["result"] is None:
            return SandboxError("its result is kept no more", hint="a larger --keep-size")
        try:
            return await self._result(record["result"], to)
        except SandboxError as error:
            return error

    async def _follow(self, run: ClientRun, pieces: AsyncGenerator[bytes, None]) -> None:
        """Events from the wire to the run's channel, at the pace of who takes them."""
        try:
            async with aclosing(pieces), aclosing(_records(pieces)) as records:
                async for record in records:
                    await self._take(run, record)
            if run._result is None and run._error is None:
                run._error = SandboxError(
                    "the daemon ended before the job did",
                    hint="submit the job without waiting to outlive it",
                )
        except SandboxError as error:
            run._error = error
        finally:
            run._done.set()
            run._send.close()

    async def _take(self, run: ClientRun, record: Mapping[str, Any]) -> None:
        if record["type"] == "exit":
            run._result = await self._result(record["result"], run._collect_to)
            run._fetched.records = {os.fsencode(one.path): one for one in run._result.artifacts}
        event = event_of(record, run._result)
        run._usage = event.usage or run._usage
        if run._deaf:
            return
        try:
            await run._send.send(event)
        except trio.BrokenResourceError:  # the reader has gone: so has the reason to run
            run._deaf = True
            run.kill()

    async def _result(self, record: Mapping[str, Any], to: Path | str) -> Result:
        """The result, with what was collected where it belongs; the exception if there is none."""
        if record["status"] == "error":
            raise error_of(record["error"])
        refused = {one["path"] for one in record["artifact_errors"]}
        kept = [one for one in record["artifacts"] if one["path"] not in refused]
        data = {}
        for digest in {one["sha256"] for one in kept} if to != "stream" else ():
            async with self._links.asking("GET", f"/v1/files/{digest}") as answer:
                data[digest] = await answer.body()
        found = result_of(record, data)
        if not isinstance(to, Path):
            return found
        whole = [one for one in found.artifacts if one.sha256 in data]
        await trio.to_thread.run_sync(save, whole, to)
        plain = tuple(msgspec.structs.replace(one, data=b"") for one in found.artifacts)
        return msgspec.structs.replace(found, artifacts=plain)

    async def _store(self, digest: str, pieces: AsyncGenerator[bytes, None]) -> None:
        async with (
            aclosing(pieces),
            self._links.asking("PUT", f"/v1/files/{digest}", pieces) as answer,
        ):
            await answer.body()

    async def info(self) -> Info:
        """What the daemon says of itself and of its caller."""
        async with self._links.asking("GET", "/v1/info") as answer:
            return msgspec.json.decode(await answer.body(), type=Info)


async def _records(
    pieces: AsyncGenerator[bytes, None],
) -> AsyncGenerator[dict[str, Any], None]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line)


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
        with suppress(SandboxError):
            async with self._links.asking("POST", f"{self._target}?eof=1", b"") as answer:
                await answer.body()


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

    def kill(self) -> None:
        """End it; its status will be `cancelled`."""
        self._soon("DELETE", f"/v1/jobs/{self.id}", None)

    def _soon(self, method: str, target: str, body: bytes | None) -> None:
        if not self._done.is_set():
            self._nursery.start_soon(self._quietly, method, target, body)

    async def _quietly(self, method: str, target: str, body: bytes | None) -> None:
        with suppress(SandboxError):  # it is over, or the daemon: wait() says which
            async with self._links.asking(method, target, body) as answer:
                await answer.body()

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


@asynccontextmanager
async def connect(
    url: str | None = None, *, token: str | None = None, trust: Trust | None = None
) -> AsyncIterator[Client]:
    """A daemon's client; leaving the block ends the runs that are still followed.

    `url` is "unix:///path", "http://host:port" or "https://host:port" (default: $SANDBOXD_HOST,
    else this user's daemon), `token` one of the daemon's (default: $SANDBOXD_TOKEN), `trust` for
    https (default: $SANDBOXD_TLS_CA, _CERT and _KEY). HostError if none is there.
    """
    where = address.named(os.environ) if url is None else address.parse(url)
    token = token if token is not None else os.environ.get("SANDBOXD_TOKEN")
    links = Links(where, token, trust or Trust.named(os.environ))
    try:
        client = Client(links)
        await client.info()
        yield client
    finally:
        with trio.CancelScope(shield=True):
            await links.close()
