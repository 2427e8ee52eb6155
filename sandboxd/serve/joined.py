"""Jobs that a daemon runs together, as their caller sees them: of a group, or of a pipeline.

Their events come on one connection, each with whose it is, and go to the channel of its run. So a
run whose events nobody takes holds up the others as well, once its channel is full.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from sandboxd.errors import JobError, SandboxError
from sandboxd.group import Group
from sandboxd.job import Job, Pipe
from sandboxd.result import Event, Result
from sandboxd.serve.remote import ClientRun
from sandboxd.serve.sending import submission_of
from sandboxd.serve.wire import FASTEST
from sandboxd.supervise.artifacts import check_place
from sandboxd.supervise.groups import check_job, decisive
from sandboxd.supervise.one_error import one_error
from sandboxd.supervise.pipeline import check

if TYPE_CHECKING:
    from sandboxd.serve.client import Client

NDJSON = "application/x-ndjson"

Emit = Callable[[str, Event], Awaitable[object]]
"""Gets the name of a member and what happened to it."""


class _Followed:
    """Jobs of one request: their runs by name, filled in when the daemon has taken them on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._by_name: dict[str, ClientRun] = {}
        self._target = ""
        self._nursery: trio.Nursery | None = None
        self._over = trio.Event()
        self._ended: list[str] = []
        self._ended_by: str | None = None

    def kill(self) -> None:
        """End all that are left; their status will be `cancelled`."""
        if self._nursery is not None and not self._over.is_set():
            self._nursery.start_soon(self._client._links.quietly, "DELETE", self._target)

    async def _follow(self, pieces: AsyncGenerator[bytes, None]) -> None:
        """Events from the wire to the channels of their runs, at the pace of who takes them."""
        error: SandboxError | None = None
        try:
            with self._client._links.unbroken():
                async with aclosing(pieces), aclosing(records_of(pieces)) as records:
                    async for record in records:
                        await self._take(record)
            error = SandboxError("the daemon ended before the jobs did", hint="its log says why")
        except SandboxError as wrong:
            error = wrong
        finally:
            for run in self._by_name.values():
                run._end(error)
            self._over.set()

    async def _take(self, record: dict[str, Any]) -> None:
        if record["type"] == "end":
            self._ended_by = record.get("ended_by")
            return
        run, error = self._by_name[record["member"]], None
        try:
            await self._client._take(run, record)
        except SandboxError as wrong:
            error = wrong
        if record["type"] == "exit":
            self._ended.append(record["member"])
            run._end(error)


class ClientGroup(_Followed):
    """A group in progress, as supervise.groups.GroupRun is."""

    def __init__(self, client: Client, group: Group) -> None:
        super().__init__(client)
        self.group = group

    @property
    def runs(self) -> Mapping[str, ClientRun]:
        """The members' runs by name."""
        return self._by_name

    @property
    def ended(self) -> list[str]:
        """Members whose run is over, in that order."""
        return self._ended

    @property
    def ended_by(self) -> str | None:
        """The member whose end stopped the others; known when all are over."""
        return self._ended_by

    async def wait(self) -> dict[str, Result]:
        """The results by name, in the order of the members."""
        found = {name: await run.wait() for name, run in self.runs.items()}
        await self._over.wait()
        return found

    def decisive(self, results: Mapping[str, Result]) -> str | None:
        """Whose status is the group's: `main`; or the first that did not end well by itself."""
        return decisive(self.group, self._ended, results)


class ClientPipeline(_Followed):
    """Jobs in progress, as supervise.pipeline.Pipeline is."""

    @property
    def runs(self) -> tuple[ClientRun, ...]:
        """In the order of the jobs."""
        return tuple(self._by_name.values())

    async def wait(self) -> list[Result]:
        """The results, with what was relayed. Someone must read the events of all meanwhile."""
        return [await run.wait() for run in self.runs]

    async def result(self, number: int) -> Result:
        """The result of one of them. Someone must read the events of all meanwhile."""
        return await self.runs[number].wait()


# -- groups ----------------------------------------------------------------------------------


async def run_group(client: Client, group: Group, emit: Emit | None) -> dict[str, Result]:
    """See Client.run_group."""
    jobs = {name: one.job for name, one in group.every().items()}
    for name, job in jobs.items():
        check_job(name, job)
    if emit is None:
        view = await _asked(client, "/v1/groups", await _group(client, group, None))
        return await _results(client, jobs, view["members"])
    async with start_group(client, group, None) as live:
        with one_error():
            async with trio.open_nursery() as nursery:
                for name, run in live.runs.items():
                    nursery.start_soon(_read, name, run, emit)
        return await live.wait()


@asynccontextmanager
async def start_group(
    client: Client, group: Group, usage_every: float | None
) -> AsyncIterator[ClientGroup]:
    """See Client.start_group."""
    check_usage(usage_every)
    jobs = {name: one.job for name, one in group.every().items()}
    live, body = ClientGroup(client, group), await _group(client, group, usage_every)
    async with _following(live, "/v1/groups", body, jobs):
        yield live


async def _group(client: Client, group: Group, usage_every: float | None) -> bytes:
    members = {
        name: {
            "job": await _job(client, one.job),
            "address": one.address,
            "after": list(one.after),
            "ready": one.ready,
        }
        for name, one in group.every().items()
    }
    names = ("name", "share", "subnet", "main", "stop")
    shared = {name: getattr(group, name) for name in names}
    return msgspec.json.encode({"members": members, **shared, "usage_every": usage_every})


async def _read(name: str, run: ClientRun, emit: Emit) -> None:
    async for event in run.events:
        await emit(name, event)


# -- pipelines -------------------------------------------------------------------------------


async def run_pipeline(client: Client, jobs: Sequence[Job], pipes: Sequence[Pipe]) -> list[Result]:
    """See Client.run_pipeline."""
    body = await _pipeline(client, jobs, pipes, None)
    view = await _asked(client, "/v1/pipelines", body)
    found = await _results(client, _numbered(jobs), _numbered(view["jobs"]))
    return list(found.values())


@asynccontextmanager
async def start_pipeline(
    client: Client, jobs: Sequence[Job], pipes: Sequence[Pipe], usage_every: float | None
) -> AsyncIterator[ClientPipeline]:
    """See Client.start_pipeline."""
    check_usage(usage_every)
    body = await _pipeline(client, jobs, pipes, usage_every)
    live = ClientPipeline(client)
    async with _following(live, "/v1/pipelines", body, _numbered(jobs)):
        yield live


async def _pipeline(
    client: Client, jobs: Sequence[Job], pipes: Sequence[Pipe], usage_every: float | None
) -> bytes:
    check(jobs, pipes)
    if any(one.hold for one in pipes):
        raise JobError(
            "hold: a daemon passes each end on at once", hint="use Runner.start_pipeline"
        )
    every = [await _job(client, job) for job in jobs]
    fields = ("writer", "reader", "stream", "relay", "limit")
    joints = [{name: getattr(one, name) for name in fields} for one in pipes]
    return msgspec.json.encode({"jobs": every, "pipes": joints, "usage_every": usage_every})


def _numbered(values: Sequence[Any]) -> dict[str, Any]:
    return {str(number): value for number, value in enumerate(values)}


# -- both ------------------------------------------------------------------------------------


def check_usage(usage_every: float | None) -> None:
    """JobError if it is no time between two events."""
    if usage_every is not None and not FASTEST <= usage_every < math.inf:
        raise JobError(f"usage_every={usage_every!r}", hint=f"{FASTEST:g} seconds or more")


async def _job(client: Client, job: Job) -> dict[str, Any]:
    check_place(job)
    return await submission_of(job, client._store)


async def _asked(client: Client, path: str, body: bytes) -> dict[str, Any]:
    """The view, once all of it is over; leaving ends it."""
    async with client._links.asking("POST", f"{path}?wait=1", body) as answer:
        found: dict[str, Any] = await answer.json()
        return found


async def _results(
    client: Client, jobs: Mapping[str, Job], views: Mapping[str, Any]
) -> dict[str, Result]:
    return {
        name: await client._result(views[name]["result"], job.collect_to)
        for name, job in jobs.items()
    }


@asynccontextmanager
async def _following(
    live: _Followed, path: str, body: bytes, jobs: Mapping[str, Job]
) -> AsyncIterator[None]:
    """All of it while its events are read; leaving ends it."""
    links, runs = live._client._links, live._by_name
    with one_error():
        async with (
            links.asking("POST", f"{path}?wait=1", body, {"Accept": NDJSON}) as answer,
            trio.open_nursery() as nursery,
        ):
            live._target, live._nursery = answer.headers["location"], nursery
            own = live._target.rpartition("/")[2]
            for name, job in jobs.items():
                runs[name] = ClientRun._of(job, job.id or f"{own}.{name}", links, nursery)
            nursery.start_soon(live._follow, answer.pieces)
            try:
                yield
            finally:
                for run in runs.values():
                    run._leave()
                nursery.cancel_scope.cancel()
    errors = [run._error for run in runs.values() if run._error and not run._error_told]
    if errors:
        raise errors[0]


async def records_of(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[dict[str, Any], None]:
    """The lines of an answer."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line)
