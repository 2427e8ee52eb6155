"""What the daemon does for jobs that are not its own any more: it goes on with those that the last
one left, and removes what is kept no longer."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, aclosing
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec
import trio

from sandboxd.errors import SandboxError
from sandboxd.result import SCHEMA
from sandboxd.serve.callers import Caller
from sandboxd.serve.journal import Expired, Row
from sandboxd.serve.live import About, Asked
from sandboxd.serve.log import remove
from sandboxd.serve.wire import Refusal, Submission, encode, submission

if TYPE_CHECKING:
    from sandboxd.serve.book import Book

MOST_ATTEMPTS = 3
EXPIRE_EVERY = 60.0
LOST = MappingProxyType(
    {
        "kind": "lost",
        "message": "the daemon ended while the job ran",
        "hint": 'submit it again; with "on_lost": "retry" the daemon does so itself',
    }
)

logger = logging.getLogger("sandboxd.serve")


# -- before ----------------------------------------------------------------------------------


async def recover(book: Book) -> None:
    """Go on where the last daemon stopped."""
    await trio.to_thread.run_sync(book.files.open)
    async with aclosing(book.journal.unfinished()) as rows:
        async for row in rows:
            try:
                wanted = submission(row.request or b"")
            except Refusal as refusal:  # a newer sandboxd takes it no more
                await _close(book, row, _told(refusal))
                continue
            if row.state == "queued" or await _retried(book, row, wanted):
                await _wait_again(book, row, wanted)


async def _retried(book: Book, row: Row, wanted: Submission) -> bool:
    """Whether a job that ran is to run once more; else it is over."""
    if wanted.on_lost == "retry" and row.attempts < MOST_ATTEMPTS:
        book.metrics.of(row.caller).retried.add()
        await trio.to_thread.run_sync(remove, book.folder(row.caller, row.id))
        return True
    book.metrics.of(row.caller).lost.add()
    logger.warning("job lost", extra={"caller": row.caller, "job": row.id})
    await _close(book, row, LOST)
    return False


async def _wait_again(book: Book, row: Row, wanted: Submission) -> None:
    body, trace = row.request or b"", msgspec.json.decode(row.about, type=About).traceparent
    asked = Asked(wanted, body, key=row.key, digest=row.body, traceparent=trace)
    try:
        with ExitStack() as held:
            live = book.make(Caller(row.caller), asked, row.id, held)
            live.held = held.pop_all()
    except Refusal as refusal:  # its policy has gone, or its files
        await _close(book, row, _told(refusal))
        return
    live.created, live.attempts, live.job = row.created, row.attempts, None
    book.enqueue(live)


async def _close(book: Book, row: Row, error: Mapping[str, str]) -> None:
    """A job of the last daemon's that ends here, without having run."""
    record = {"schema": SCHEMA, "status": "error", "error": dict(error)}
    data = encode(record)
    ended = msgspec.structs.replace(row, status="error", result=data, ended=time.time())
    await book.journal.close(ended, len(data), insist=False)


def _told(refusal: Refusal) -> dict[str, str]:
    """A refusal that comes too late to be an answer."""
    return {"kind": refusal.kind, "message": str(refusal), "hint": refusal.hint}


# -- once in a while -------------------------------------------------------------------------


async def keep_small(book: Book) -> None:
    """Remove what is old, for ever. A disk that is full or broken is no reason to end."""
    while True:
        try:
            await expire(book)
        except (SandboxError, OSError) as error:
            logger.error("what is old could not be removed", extra={"why": str(error)})
        await trio.sleep(EXPIRE_EVERY)


async def expire(book: Book) -> None:
    """Remove what is kept no longer. The journal forgets a job last: so whatever moment the daemon
    dies at, the next one knows of all that lies around."""
    age, size = book.settings.age, book.settings.size
    await trio.to_thread.run_sync(book.files.expire, age)
    while doomed := await book.journal.expired(age, size):
        gone = [one for one in doomed if await _removed(book, one)]
        await book.journal.forget(gone)
        if len(gone) < len(doomed):  # the next time again
            break
    await book.journal.forget_batches(age)


async def _removed(book: Book, one: Expired) -> bool:
    try:
        await trio.to_thread.run_sync(remove, book.folder(one.caller, one.id))
    except OSError as error:
        why = f"its events: {error}"
        logger.error("what is old could not be removed", extra={"job": one.id, "why": why})
        return False
    return True
