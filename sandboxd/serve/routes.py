"""What is done for each request: from the routes of api.py to the jobs of the book."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import re
from dataclasses import dataclass

import h11
import msgspec
import trio

import sandboxd
from sandboxd.errors import HostError, SandboxError
from sandboxd.result import error_json
from sandboxd.serve import api, events
from sandboxd.serve.api import Route
from sandboxd.serve.batches import AskedBatch, Batches
from sandboxd.serve.book import Book
from sandboxd.serve.callers import Caller, Callers
from sandboxd.serve.carry import carry_here
from sandboxd.serve.ensembles import Ensembles
from sandboxd.serve.files import pieces_of
from sandboxd.serve.http import Gone, Reply, Request
from sandboxd.serve.journal import Row
from sandboxd.serve.live import Asked, Live, view
from sandboxd.serve.metrics import TEXT
from sandboxd.serve.overview import Looks
from sandboxd.serve.page import HTML, page
from sandboxd.serve.quotas import Budget
from sandboxd.serve.together import Together
from sandboxd.serve.wire import (
    DIGEST,
    FileView,
    Info,
    JobList,
    PolicyView,
    Refusal,
    SignalRequest,
    decode,
    refusal_of,
    submission,
    traceparent,
)
from sandboxd.supervise import policies
from sandboxd.supervise.run import Hands

MOST_SMALL = 64 << 10
MOST_STDIN = 1 << 40
PAGE, MOST_ON_PAGE = 100, 500
LONGEST_WAIT = 300.0
FASTEST_LOOKS = 0.2
"""Seconds between two looks of a stream, at least."""
STARTING = 30.0
"""Seconds that stdin and signals wait for a job to begin."""

logger = logging.getLogger("sandboxd.serve")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of what is taken over the wire, in bytes."""

    body: int = 16 << 20
    bodies: int = 256 << 20
    """Of all requests that are being read, and of jobs whose callers wait for them."""


class Call(msgspec.Struct, frozen=True):
    """A request whose route and caller are known."""

    request: Request
    caller: Caller
    names: dict[str, str]

    @property
    def query(self) -> dict[str, str]:
        return self.request.query

    def number(self, name: str, default: int | None, most: int) -> int | None:
        """A number in the query; Refusal 400 if it is none."""
        text = self.query.get(name)
        if text is None:
            return default
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
            raise Refusal(400, "request", f"{name}={text[:40]!r}: not a number")
        return min(int(text), most)

    def following(self) -> int | None:
        """The event that a reader wants first."""
        last = self.request.headers.get("last-event-id", "")
        following = self.number("from", None, 1 << 62)
        if following is None and re.fullmatch(r"\d{1,16}", last, re.ASCII):
            return int(last) + 1
        return following

    def flag(self, name: str) -> bool:
        return self.query.get(name, "0") not in ("0", "")


class Routes(Together):
    """The handler of every connection."""

    def __init__(self, book: Book, callers: Callers, bounds: Bounds) -> None:
        self.book = book
        self.batches = Batches(book)
        self.ensembles = Ensembles(book)
        self.callers = callers
        self.bounds = bounds
        self.budget = Budget(bounds.bodies)
        self.looks = Looks(book)
        self._openapi = Reply.of(api.openapi()).body

    async def handle(self, request: Request) -> Reply:
        """The reply, whatever happens; Gone where nobody waits for one."""
        self.book.replying += 1
        reply = None
        try:
            reply = await self._answer(request)
        finally:
            if reply is None:
                self.book.sent()
        reply.replied = self.book.sent
        return reply

    async def _answer(self, request: Request) -> Reply:
        try:
            reply = await self._handle(request)
        except Refusal as refusal:
            reply = Reply.no(refusal)
        except SandboxError as error:
            reply = Reply.no(refusal_of(error, error_json(error)))
        except (Gone, trio.BrokenResourceError, h11.ProtocolError):  # the connection's own affair
            raise
        except Exception as error:
            logger.exception("request failed", extra={"path": "/".join(request.path)[:200]})
            told = Refusal(
                500,
                "internal",
                f"{type(error).__name__}: a bug in sandboxd",
                hint="the daemon's log says more",
            )
            reply = Reply.no(told)
        self.book.metrics.requests.add(status=str(reply.status))
        return reply

    async def _handle(self, request: Request) -> Reply:
        route, names = self._find(request)
        caller = Caller("")
        if not route.open:
            caller = self.callers.find(request.peer, request.headers)
        reply: Reply = await getattr(self, route.name)(Call(request, caller, names))
        return reply

    def _find(self, request: Request) -> tuple[Route, dict[str, str]]:
        method = "GET" if request.method == "HEAD" else request.method
        there = api.matching(request.path)
        for route, names in there:
            if route.method == method:
                return route, names
        if not there:
            raise Refusal(404, "request", "no such path", hint="GET /openapi.json has all")
        allowed = ", ".join(sorted({route.method for route, _ in there}))
        refusal = Refusal(
            405, "request", f"{request.method[:20]} is not for this path", hint=allowed
        )
        raise refusal.with_header("Allow", allowed)

    # -- jobs

    async def submit(self, call: Call) -> Reply:
        request, wait = call.request, call.flag("wait")
        key = _key(request)
        most, kind = self.bounds.body, events.wanted(request) if wait else None
        size = most if request.length is None else min(request.length, most)
        self.budget.take(size)
        try:
            body = await request.body(most)
            size = self.budget.keep(size, body)
            asked = Asked(
                submission(body),
                body,
                attached=wait and key is None,
                followed=kind is not None,
                here=wait and key is None and kind is None,
                key=key,
                digest=hashlib.sha256(body).digest() if key is not None else None,
                traceparent=traceparent(request.headers.get("traceparent")),
            )
            found, new = await self.book.submit(call.caller, asked)
            if not wait:
                reply = Reply.of(view(found), 202 if new else 200)
            elif kind is not None:
                reply = await events.reply(self.book, found, events.Want(kind=kind))
                self._until_its_end(reply, found if asked.attached else None, size)
                size = 0
            else:
                reply = Reply.of(view(await self._wait(request, found)))
        finally:
            self.budget.give_back(size)
        reply.headers.append(("Location", f"/v1/jobs/{found.id}"))
        return reply

    def _until_its_end(self, reply: Reply, live: Live | Row | None, size: int) -> None:
        """With the end of the reply the job ends, and what its body takes is given back."""
        following = reply.ended

        async def ended() -> None:
            try:
                if following is not None:
                    await following()
                if isinstance(live, Live) and not live.done.is_set():
                    await self.book.cancel(live)
            finally:
                self.budget.give_back(size)

        reply.ended = ended

    async def _wait(self, request: Request, found: Live | Row) -> Live | Row:
        if isinstance(found, Row):
            return found
        if found.turn is not None:
            await carry_here(self.book, found, request.handle)
        elif not await request.waits(found.done, math.inf):
            raise Gone
        if found.refused is not None:
            raise found.refused
        return found

    async def _job(self, call: Call, *, whole: bool = True) -> Live | Row:
        found = await self.book.find(call.caller, call.names["id"], whole=whole)
        if found is None:
            raise Refusal(404, "job", "no such job", hint="GET /v1/jobs, or ps -a, lists yours")
        return found

    async def jobs(self, call: Call) -> Reply:
        state = call.query.get("state")
        if state not in (None, "queued", "running", "done"):
            raise Refusal(400, "request", "state: queued, running or done")
        most = call.number("limit", PAGE, MOST_ON_PAGE) or PAGE
        before = call.number("before", None, 1 << 62)
        rows = await self.book.journal.page(call.caller.name, state, before, most)
        live = self.book.live
        mine = (
            []
            if before is not None
            else [
                one
                for (caller, _), one in live.items()
                if caller == call.caller.name and one.asked.attached
            ]
        )
        every = [*reversed(mine), *(live.get((row.caller, row.id), row) for row in rows)]
        views = [view(one, brief=True) for one in every]
        following = rows[-1].number if len(rows) == most else None
        shown = tuple(one for one in views if state in (None, one.state))
        return Reply.of(JobList(jobs=shown, next=following))

    async def job(self, call: Call) -> Reply:
        found = await self._job(call)
        wait = call.number("wait", 0, int(LONGEST_WAIT))
        if wait and isinstance(found, Live) and not await call.request.waits(found.done, wait):
            raise Gone
        return Reply.of(view(found))

    async def cancel(self, call: Call) -> Reply:
        found = await self._job(call)
        if isinstance(found, Row):
            return Reply.of(view(found))
        await self.book.cancel(found)
        return Reply.of(view(found), 202)

    async def events(self, call: Call) -> Reply:
        following = call.following()
        kind = events.wanted(call.request) or api.NDJSON
        follow = call.query.get("follow") != "0"
        want = events.Want(following, kind, follow)
        return await events.reply(self.book, await self._job(call, whole=False), want)

    # -- batches

    async def submit_batch(self, call: Call) -> Reply:
        request, most = call.request, self.bounds.body
        size = most if request.length is None else min(request.length, most)
        with self.budget.hold(size):
            body = await request.body(most)
            trace = traceparent(request.headers.get("traceparent"))
            asked = AskedBatch(body, _key(request), trace)
            row, new = await self.batches.submit(call.caller, asked)
        where = ("Location", f"/v1/batches/{row.id}")
        if not call.flag("wait"):
            reply = Reply.of(await self.batches.view(row), 202 if new else 200)
        else:
            lines = self.batches.lines(row, 0, follow=True)
            reply = events.formed(lines, events.wanted(request) or api.NDJSON)
            if asked.key is None:
                reply.ended = functools.partial(self.batches.disconnected, row)
        reply.headers.append(where)
        return reply

    async def batch(self, call: Call) -> Reply:
        row = await self.batches.find(call.caller, call.names["id"])
        return Reply.of(await self.batches.view(row))

    async def cancel_batch(self, call: Call) -> Reply:
        row = await self.batches.find(call.caller, call.names["id"])
        await self.batches.cancel(row)
        return Reply.of(await self.batches.view(row), 202)

    async def batch_events(self, call: Call) -> Reply:
        row = await self.batches.find(call.caller, call.names["id"])
        following = call.following() or 0
        lines = self.batches.lines(row, following, follow=call.query.get("follow") != "0")
        return events.formed(lines, events.wanted(call.request) or api.NDJSON)

    # -- what a job is told while it runs

    async def _begun(self, call: Call) -> tuple[Live, Hands]:
        """The job and its run; Refusal 409 where there is none."""
        found = await self._job(call)
        if isinstance(found, Live):
            with trio.move_on_after(STARTING):
                await found.begun.wait()
            if found.run is not None and not found.done.is_set():
                return found, found.run
            if not found.begun.is_set():
                raise Refusal(
                    409, "state", "the job still waits for a slot", hint="ask again later"
                )
        raise Refusal(409, "closed", "the job is over")

    async def stdin(self, call: Call) -> Reply:
        found, run = await self._begun(call)
        if run.stdin is None:
            raise Refusal(
                409, "state", "the job is not interactive", hint='submit "interactive": true'
            )
        over = found.done.until()
        try:
            with over:
                await _feed(call, run.stdin)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Refusal(409, "closed", "the program has closed its stdin") from None
        except trio.BusyResourceError:
            raise Refusal(409, "conflict", "somebody else feeds it at this moment") from None
        finally:
            found.done.forget(over)
        if over.cancelled_caught and not call.request.body_read:
            raise Refusal(409, "closed", "the job is over")
        return Reply(204)

    async def signal(self, call: Call) -> Reply:
        wanted: SignalRequest = decode(await call.request.body(MOST_SMALL), SignalRequest)
        if wanted.signal == "KILL":
            found = await self._job(call)
            if isinstance(found, Row):
                raise Refusal(409, "closed", "the job is over")
            await self.book.cancel(found)
            return Reply(204)
        _, run = await self._begun(call)
        try:
            if wanted.signal == "STOP":
                await run.pause()
            elif wanted.signal == "CONT":
                run.resume()
            else:
                run.resize(wanted.rows or 24, wanted.columns or 80)
        except SandboxError as error:
            refusal = refusal_of(error, error_json(error))
            refusal.status = 501 if isinstance(error, HostError) else 409
            raise refusal from None
        return Reply(204)

    # -- files, and the rest

    async def put_file(self, call: Call) -> Reply:
        digest = _digest(call)
        pieces = call.request.chunks(self.book.settings.quotas.stored)
        async with contextlib.aclosing(pieces):
            size = await self.book.files.put(call.caller, digest, pieces)
        return Reply.of(FileView(sha256=digest, bytes=size), 201)

    async def get_file(self, call: Call) -> Reply:
        path = self.book.files.path(call.caller.name, _digest(call))
        return Reply(kind=api.BINARY, stream=pieces_of(path))

    async def policies(self, call: Call) -> Reply:
        found = await trio.to_thread.run_sync(policies.available)
        return Reply.of([PolicyView(name=one.name, description=one.description) for one in found])

    async def info(self, call: Call) -> Reply:
        book, quotas = self.book, self.book.settings.quotas
        apart, name = book.settings.apart, call.caller.name
        limits: dict[str, int | float | None] = {
            "body": self.bounds.body,
            "queue": quotas.queue,
            "queued": quotas.queued,
            "running": quotas.running,
            "cpu_per_hour": quotas.cpu,
            "stored": quotas.stored,
            "events": book.settings.events,
        }
        return Reply.of(
            Info(
                version=sandboxd.__version__,
                caller=name,
                tenant=(book.runner.shares(name) if apart else "") or "own",
                slots=book.runner.slots,
                running=book.share.running,
                queued=book.share.queued,
                draining=book.draining,
                limits=limits,
            )
        )

    async def overview(self, call: Call) -> Reply:
        kind = events.wanted(call.request)
        if kind is None:
            return Reply.of(self.looks.look(call.caller))
        every = max(FASTEST_LOOKS, (call.number("every", 1000, 3_600_000) or 1000) / 1000)
        stream = self.looks.stream(call.caller, every, events=kind == api.SSE)
        return Reply(kind=kind, stream=stream)

    async def ui(self, call: Call) -> Reply:
        body, headers = page()
        return Reply(body=body, kind=HTML, headers=list(headers))

    async def healthz(self, call: Call) -> Reply:
        return Reply(body=b"ok\n", kind=TEXT)

    async def readyz(self, call: Call) -> Reply:
        if self.book.draining:
            return Reply(503, b"draining\n", TEXT)
        return Reply(body=b"ok\n", kind=TEXT)

    async def metrics(self, call: Call) -> Reply:
        whose = None if call.caller.oversees else call.caller.name
        return Reply(body=self.book.metrics.text(whose), kind=TEXT)

    async def openapi(self, call: Call) -> Reply:
        return Reply(body=self._openapi)


def _key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(api.KEY, key):
        raise Refusal(400, "request", "Idempotency-Key: 1 to 255 characters of ASCII")
    return key


async def _feed(call: Call, stdin: trio.abc.SendStream) -> None:
    pieces = call.request.chunks(MOST_STDIN, patient=True)
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            await stdin.send_all(piece)
    if call.flag("eof"):
        await stdin.aclose()


def _digest(call: Call) -> str:
    digest = call.names["sha256"]
    if not re.fullmatch(DIGEST, digest, re.ASCII):
        raise Refusal(
            400, "file", "a file is named by its SHA-256: 64 hexadecimal digits, lower case"
        )
    return digest
