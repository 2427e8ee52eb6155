"""The events of a job as a reply: lines of JSON or server-sent events, of jobs alive and over."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass

import trio

from sandboxd.serve import api
from sandboxd.serve.book import Book
from sandboxd.serve.http import Gone, Reply, Request
from sandboxd.serve.journal import Row
from sandboxd.serve.live import Live
from sandboxd.serve.log import TooOld, first_of_finished, read_finished
from sandboxd.serve.wire import FIRST_OF_ATTEMPT, Refusal, last_line, ndjson, place, sse

COMMENT = b":\n\n"
"""Of server-sent events: so that nobody on the way takes a quiet job for a dead connection."""


def wanted(request: Request) -> str | None:
    """The kind of stream that the request accepts, if any."""
    accepted = request.headers.get("accept", "")
    return next((kind for kind in (api.SSE, api.NDJSON) if kind in accepted), None)


@dataclass(frozen=True, slots=True)
class Want:
    """Which events, and how: from a number on, or all that are kept; to the end, or to now."""

    following: int | None = None
    kind: str = api.NDJSON
    follow: bool = True


async def reply(book: Book, found: Live | Row, want: Want) -> Reply:
    """The events; Refusal 410 if the first of them is kept no more."""
    following, kind = want.following, want.kind
    if isinstance(found, Row):
        first = await _first(book, found)
        if following is not None and first is not None and following < first:
            raise _gone(first)
        return Reply(kind=kind, stream=_formed(_finished(book, found, following or 0), kind))
    held = ExitStack()
    try:
        reader = held.enter_context(found.log.reading(following))
    except TooOld as error:
        raise _gone(error.first) from None

    async def ended() -> None:
        held.close()

    return Reply(
        kind=kind, stream=_formed(found.log.read(reader, follow=want.follow), kind), ended=ended
    )


async def _first(book: Book, row: Row) -> int | None:
    """The oldest event that is kept of a job that is over."""
    if row.events is not None:
        return place(row.events)[0] if row.events else None
    folder = book.folder(row.caller, row.id)
    return await trio.to_thread.run_sync(first_of_finished, folder)


def formed(pieces: AsyncGenerator[list[bytes], None], kind: str) -> Reply:
    """A reply of lines that come."""
    return Reply(kind=kind, stream=_formed(pieces, kind))


async def _formed(
    pieces: AsyncGenerator[list[bytes], None], kind: str
) -> AsyncGenerator[bytes, None]:
    form = sse if kind == api.SSE else ndjson
    async with aclosing(pieces):
        try:
            async for lines in pieces:
                if lines:
                    yield b"".join(map(form, lines))
                elif kind == api.SSE:
                    yield COMMENT
        except TooOld:  # what comes next is gone: breaking off is all that can be said now
            raise Gone from None


async def _finished(book: Book, row: Row, following: int) -> AsyncGenerator[list[bytes], None]:
    """What is kept of a job that is over; its result is only read when its turn comes."""
    last = (row.attempts - 1) * FIRST_OF_ATTEMPT - 1
    if row.events is not None:
        lines = row.events.splitlines()
        if lines:
            last = place(lines[-1])[0]
        yield [line for line in lines if place(line)[0] >= following]
    else:
        async with aclosing(read_finished(book.folder(row.caller, row.id))) as pieces:
            async for lines in pieces:
                last = place(lines[-1])[0]
                yield [line for line in lines if place(line)[0] >= following]
    if last + 1 >= following:
        whole = await book.journal.find(row.caller, row.id)
        if whole is None or whole.result is None:
            raise TooOld(last + 1)
        yield [last_line(last + 1, whole.result)]


def _gone(first: int) -> Refusal:
    refusal = Refusal(
        410,
        "gone",
        f"events before {first} are kept no more",
        hint=f"?from={first}, and the record has the first and the last bytes",
    )
    refusal.more["first"] = first
    return refusal
