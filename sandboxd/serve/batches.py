"""Batches: many jobs of one request, told of in their order, and stopped early where that is asked.

Each case is a job like any other, of its own id, queue and record. What makes them a batch is a row
in the journal with their number. A case's line has the case's number as its `seq`: so a reader goes
on where it was, also after the daemon has been started anew, and nothing more is kept for that.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

import trio

from sandboxd.serve.book import Book
from sandboxd.serve.callers import Caller
from sandboxd.serve.journal import BatchRow, Row
from sandboxd.serve.live import Asked, Live
from sandboxd.serve.log import QUIET
from sandboxd.serve.manifold import (
    BatchSubmission,
    BatchView,
    CaseView,
    case_line,
    cases_of,
    end_line,
)
from sandboxd.serve.wire import Refusal, State, decode, submission
from sandboxd.supervise.record import moment


@dataclass(frozen=True, slots=True)
class AskedBatch:
    """A batch and how it came."""

    body: bytes
    key: str | None = None
    traceparent: str | None = None


class Stopping:
    """A batch with cases that are not over; with `stop` a failure ends those after it."""

    def __init__(self, book: Book, row: BatchRow) -> None:
        self._book = book
        self._row = row

    def over(self, live: Live) -> None:
        if self._row.stop == "failure" and live.status not in (None, "ok", "cancelled"):
            self.stop_after(_number(live.id))

    def stop_after(self, number: int) -> None:
        """Cancel the cases that come after this one."""
        for name in self._row.names[number + 1 :]:
            live = self._book.live.get((self._row.caller, name))
            if live is not None and not live.cancelled:
                live.cancelled = True
                self._book.soon(live)


class Batches:
    """The batches of a book."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._merging = trio.Lock()
        """Whole submissions of all cases are in memory: of one batch at a time."""

    async def submit(self, caller: Caller, asked: AskedBatch) -> tuple[BatchRow, bool]:
        """The batch, and whether it is new; Refusal if it is not taken on."""
        wanted: BatchSubmission = decode(asked.body, BatchSubmission)
        row = BatchRow(
            caller=caller.name,
            id=wanted.id or os.urandom(16).hex(),
            key=asked.key,
            body=None if asked.key is None else hashlib.sha256(asked.body).digest(),
            cases=len(wanted.cases),
            stop=wanted.stop,
            created=time.time(),
        )
        words = [f"batch {row.id}", *(f"id {name}" for name in row.names)]
        words += [] if row.key is None else [f"key {row.key}"]
        names = {(caller.name, word) for word in words}
        if self._book.coming & names:
            raise Refusal(
                409, "conflict", "the same is being submitted at this moment", hint="ask again"
            ).with_header("Retry-After", "1")
        self._book.coming |= names
        try:
            if (known := await self._known(row)) is not None:
                return known, False
            await self._check_free(caller, row)
            trace = asked.traceparent
            async with self._merging:
                cases = [Asked(submission(one), one, traceparent=trace) for one in cases_of(wanted)]
                await self._book.take_on_all(caller, cases, row, Stopping(self._book, row))
            return row, True
        finally:
            self._book.coming -= names

    async def _known(self, row: BatchRow) -> BatchRow | None:
        """The batch that was submitted with this key before."""
        if row.key is None:
            return None
        found = await self._book.journal.find_batch_key(row.caller, row.key)
        if found is not None and found.body != row.body:
            raise Refusal(
                422,
                "conflict",
                "this Idempotency-Key came with another batch before",
                hint="a new batch needs a new key",
            )
        return found

    async def _check_free(self, caller: Caller, row: BatchRow) -> None:
        taken = await self._book.journal.find_batch(row.caller, row.id) is not None
        taken = taken or bool(await self._book.journal.statuses(row))
        if taken or any((caller.name, name) in self._book.live for name in row.names):
            raise Refusal(
                409, "conflict", f"there is a batch {row.id!r}, or a job of it", hint="another id"
            )

    async def find(self, caller: Caller, batch: str) -> BatchRow:
        """A batch of this caller's; Refusal 404."""
        found = await self._book.journal.find_batch(caller.name, batch)
        if found is None:
            raise Refusal(404, "batch", "no such batch", hint="GET /v1/jobs lists your jobs")
        return found

    async def view(self, row: BatchRow) -> BatchView:
        known = await self._book.journal.statuses(row)
        cases = [self._case(row, name, known) for name in row.names]
        goes_on = any(one.state in ("queued", "running") for one in cases)
        return BatchView(
            id=row.id,
            state="running" if goes_on else "done",
            stop=row.stop,
            created_at=moment(row.created),
            cases=tuple(cases),
        )

    def _case(
        self, row: BatchRow, name: str, known: Mapping[str, tuple[State, str | None]]
    ) -> CaseView:
        live = self._book.live.get((row.caller, name))
        if live is not None:
            return CaseView(id=name, state=live.state, status=live.status)
        if name not in known:
            return CaseView(id=name, state="gone", status=None)
        state, status = known[name]
        return CaseView(id=name, state=state, status=status)

    async def disconnected(self, row: BatchRow) -> None:
        """Who waited for it has gone; or the daemon goes, and the next one goes on with it."""
        if not self._book.draining:
            await self.cancel(row)

    async def cancel(self, row: BatchRow) -> None:
        """Those of its cases that are not over."""
        Stopping(self._book, row).stop_after(-1)
        await trio.lowlevel.checkpoint()

    async def lines(
        self, row: BatchRow, following: int, *, follow: bool
    ) -> AsyncGenerator[list[bytes], None]:
        """A line for each case in turn, and the end; an empty list where nothing happens."""
        for number in range(following, row.cases):
            name = row.names[number]
            while (live := self._book.live.get((row.caller, name))) is not None:
                if not follow:
                    return
                with trio.move_on_after(QUIET) as quiet:
                    await live.done.wait()
                if quiet.cancelled_caught:
                    yield []
                elif live.refused is not None:  # the daemon goes down: the next one goes on
                    return
            found = await self._book.journal.find(row.caller, name)
            yield [_line(number, name, found)]
        yield [end_line(row.cases)]

    async def recover(self) -> None:
        """Cases that the last daemon left know again what they belong to."""
        live = self._book.live
        for caller, batch in {(caller, job.rpartition(".")[0]) for caller, job in live}:
            row = await self._book.journal.find_batch(caller, batch)
            if row is None:
                continue
            stopping = Stopping(self._book, row)
            for name in row.names:
                if (caller, name) in live:
                    live[caller, name].batch = stopping
            await self._stop_again(row, stopping)

    async def _stop_again(self, row: BatchRow, stopping: Stopping) -> None:
        """What the last daemon did not get to, and what ended before we listened."""
        known = await self._book.journal.statuses(row)
        failed = [
            _number(name)
            for name, (state, status) in known.items()
            if state == "done" and status not in ("ok", "cancelled")
        ]
        if row.stop == "failure" and failed:
            stopping.stop_after(min(failed))


def _number(job: str) -> int:
    return int(job.rpartition(".")[2])


def _line(number: int, name: str, found: Row | None) -> bytes:
    if found is None or found.result is None:  # it got too old, or too large
        return case_line(number, name, "gone", b"null")
    return case_line(number, name, found.status or "error", found.result)
