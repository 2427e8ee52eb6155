"""A Runner that is elsewhere: the same methods, carried out by a daemon."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio

from sandboxd.errors import JobError, SandboxError
from sandboxd.group import Group
from sandboxd.job import Job, Pipe
from sandboxd.result import Result
from sandboxd.serve import address, joined
from sandboxd.serve.link import Links
from sandboxd.serve.remote import ClientRun
from sandboxd.serve.sending import submission_of
from sandboxd.serve.tls import Trust
from sandboxd.serve.wire import Info, error_of, event_of, result_of
from sandboxd.supervise.artifacts import check_place, save
from sandboxd.supervise.one_error import one_error


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
        joined.check_usage(usage_every)
        check_place(job)
        wanted = await submission_of(job, self._store)
        wanted |= {"overflow": "stall", "usage_every": usage_every}
        body, headers = msgspec.json.encode(wanted), {"Accept": joined.NDJSON}
        with one_error():
            async with (
                self._links.asking("POST", "/v1/jobs?wait=1", body, headers) as answer,
                trio.open_nursery() as nursery,
            ):
                name = answer.headers["location"].rpartition("/")[2]
                run = ClientRun._of(job, name, self._links, nursery)
                nursery.start_soon(self._follow, run, answer.pieces)
                try:
                    yield run
                finally:
                    run._leave()
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
        async with aclosing(pieces), aclosing(joined.records_of(pieces)) as records:
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
        error: SandboxError | None = None
        try:
            with self._links.unbroken():
                async with aclosing(pieces), aclosing(joined.records_of(pieces)) as records:
                    async for record in records:
                        await self._take(run, record)
            if run._result is None:
                error = SandboxError(
                    "the daemon ended before the job did",
                    hint="submit the job without waiting to outlive it",
                )
        except SandboxError as wrong:
            error = wrong
        finally:
            run._end(error)

    async def _take(self, run: ClientRun, record: Mapping[str, Any]) -> None:
        """An event of a run's; SandboxError if that is why there is no result."""
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

    async def run_group(
        self, group: Group, *, emit: joined.Emit | None = None
    ) -> dict[str, Result]:
        """Carry jobs out that reach each other, as Runner.run_group does. Cancelling it closes the
        connection, which ends them."""
        return await joined.run_group(self, group, emit)

    def start_group(
        self, group: Group, *, usage_every: float | None = None
    ) -> AbstractAsyncContextManager[joined.ClientGroup]:
        """The same while the events of all members are read, at the same time: they come on one
        connection. Leaving the block kills what is left."""
        return joined.start_group(self, group, usage_every)

    async def run_pipeline(self, jobs: Sequence[Job], pipes: Sequence[Pipe]) -> list[Result]:
        """Carry jobs out at the same time, joined by pipes; their results, in their order."""
        return await joined.run_pipeline(self, jobs, pipes)

    def start_pipeline(
        self, jobs: Sequence[Job], pipes: Sequence[Pipe], *, usage_every: float | None = None
    ) -> AbstractAsyncContextManager[joined.ClientPipeline]:
        """The same while the events of all are read, at the same time; leaving the block kills what
        is left."""
        return joined.start_pipeline(self, jobs, pipes, usage_every)

    async def info(self) -> Info:
        """What the daemon says of itself and of its caller."""
        async with self._links.asking("GET", "/v1/info") as answer:
            return msgspec.json.decode(await answer.body(), type=Info)


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
    shown = address.token(os.environ.get("SANDBOXD_TOKEN") if token is None else token)
    links = Links(where, shown, trust or Trust.named(os.environ))
    try:
        client = Client(links)
        await client.info()
        yield client
    finally:
        with trio.CancelScope(shield=True):
            await links.close()
