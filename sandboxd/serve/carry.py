"""One job from its slot to its record: run, followed, collected, written down, told."""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING

import msgspec
import trio

from sandboxd.errors import HostError, InternalError, SandboxError
from sandboxd.job import Job
from sandboxd.result import Artifact, ArtifactError, Event, Result, encoded, failure_json
from sandboxd.serve.lines import tell
from sandboxd.serve.live import Live
from sandboxd.serve.wire import FIRST_OF_ATTEMPT, Refusal, encode, event_line, last_line, submission
from sandboxd.supervise.run import Followed, Hands, Run

if TYPE_CHECKING:
    from sandboxd.serve.book import Book

MOST_ENDING = 64
"""Jobs without a slot whose results are on their way to the journal."""
STALLED = 300.0
"""Seconds after which a job is killed that waits for a reader who takes nothing."""

logger = logging.getLogger("sandboxd.serve")


def going_down() -> Refusal:
    refusal = Refusal(503, "draining", "the daemon is going down", hint="ask again in a moment")
    return refusal.with_header("Retry-After", "5")


async def carry_here(book: Book, live: Live, handle: int | None) -> None:
    """A job with a `turn`, in the task of its caller, who hangs up at the end of `handle`."""
    assert live.turn is not None
    try:
        with book.lookout.watching(handle, functools.partial(book.soon, live)):
            await live.turn.wait()
            if not live.done.is_set():
                await carry_out(book, live)
    finally:
        if not live.done.is_set():
            _never_begun(book, live)


def _never_begun(book: Book, live: Live) -> None:
    """Whose task ended while it waited, or when it had its slot and did not know yet."""
    if not book.withdraw(live) and live.slotted is None:
        return  # who cancelled it is about to say so
    live.refused = going_down()
    book.leave_slot(live)
    book.over(live)


async def carry_out(book: Book, live: Live) -> None:
    """A job that has its slot."""
    live.slotted = time.monotonic()
    try:
        await trio.lowlevel.checkpoint_if_cancelled()  # else the journal would have it as started
        live.started = time.time()
        live.attempts += 1
        counts = book.metrics.of(live.caller.name)
        counts.queue_time.observe(max(0.0, live.started - live.created))
        found = await _run(book, live)
        live.ended = time.time()
        book.ending += 1
        try:
            if book.ending <= MOST_ENDING:
                book.leave_slot(live)
            await end(book, live, found)
        finally:
            book.ending -= 1
    except trio.Cancelled:
        live.refused = going_down()  # in the journal it still runs: the next daemon decides
        raise
    finally:
        book.leave_slot(live)
        book.over(live)


async def never_started(book: Book, live: Live) -> None:
    """A job that was cancelled while it waited."""
    try:
        job = await _job(book, live)
        result = book.runner.never_started(job, time.time() - live.created)
        await end(book, live, result)
    except SandboxError as error:
        await end(book, live, error)
    finally:
        book.over(live)


async def _run(book: Book, live: Live) -> Result | SandboxError:
    """The result, or why there is none."""
    try:
        if not live.asked.attached:
            await book.journal.start(live.caller.name, live.id, live.attempts)
        live.state = "running"  # not before that is known after a crash, too
        job = await _job(book, live)
        return await kept(book, live, await _result(book, live, job))
    except SandboxError as error:
        return error
    except Refusal as refusal:  # a file it names has gone
        return SandboxError(str(refusal), hint=refusal.hint)
    except Exception as error:
        logger.exception("job failed", extra={"caller": live.caller.name, "job": live.id})
        return InternalError(f"{type(error).__name__}: {error}", hint="the daemon's log says more")


async def _result(book: Book, live: Live, job: Job) -> Result:
    every = live.asked.wanted.usage_every
    if live.asked.followed or job.stdin is None or job.terminal is not None or every is not None:
        async with book.runner.start(job, usage_every=every) as run:
            begin(live, run)
            return await _follow(live, run)

    followed = Followed(live.id, functools.partial(tell_of, live))
    begin(live, followed)
    return await book.runner.follow(job, followed)


def begin(live: Live, run: Hands) -> None:
    """There are hands on it; who cancelled it before uses them now."""
    live.run = run
    live.begun.set()
    if live.cancelled:
        run.kill()


async def _job(book: Book, live: Live) -> Job:
    """What the journal has is read when it is needed, so that what waits takes no memory."""
    if live.job is not None:
        return live.job
    row = await book.journal.find(live.caller.name, live.id)
    if row is None or row.request is None:
        raise InternalError(f"the journal has no request of {live.id}")
    return book.job(live.caller.name, submission(row.request), live.id)


async def _follow(live: Live, run: Run) -> Result:
    await pass_on(live, run)
    return await run.wait()


async def pass_on(live: Live, run: Run) -> None:
    """Its events, at the pace of who reads them."""
    async for event in run.events:
        if event.result is None:
            await tell_of(live, event)


async def tell_of(live: Live, event: Event) -> None:
    """Into its log; who reads nothing for too long loses the job."""
    seq, line = event_line(event, live.attempts)
    if live.log.put(seq, line):
        return
    with trio.move_on_after(STALLED) as patience:
        await live.log.make_room()
    if patience.cancelled_caught and live.run is not None:
        live.log.hurry()
        live.run.kill()


async def kept(book: Book, live: Live, result: Result) -> Result:
    """What was collected is a file of the caller's now, or the result says why not."""
    problems = []
    for artifact in result.artifacts:
        reason = await trio.to_thread.run_sync(_save, book, live, artifact)
        if reason:
            problems.append(ArtifactError(path=artifact.path, reason=f"not kept: {reason}"))
    if not problems:
        return result
    return msgspec.structs.replace(result, artifact_errors=(*result.artifact_errors, *problems))


def _save(book: Book, live: Live, artifact: Artifact) -> str:
    """In a thread: why it could not be."""
    try:
        book.files.save(live.caller.name, artifact.sha256, artifact.data)
    except Refusal:
        return "the caller's files take up too much"
    except HostError as error:
        return str(error)
    return ""


async def end(book: Book, live: Live, found: Result | SandboxError) -> None:
    """Its record is written, and then told."""
    await live.log.settle()
    live.ended = live.ended or time.time()
    if isinstance(found, Result):
        live.status, data = found.status, encoded(found)
    else:
        live.status, data = "error", encode(failure_json(found))
    events = live.log.lines()
    kept = None if events is None else b"\n".join(events)
    row = live.row(None, data, kept)
    size = len(data) + (len(kept) if kept is not None else book.settings.events)
    if live.asked.attached:
        await book.journal.enter(row, size)
    else:  # as long as there is no room for it, nobody is told
        await book.journal.close(row, size, insist=True)
    live.record, live.state = data, "done"
    said = found.message if isinstance(found, Result) else f"{found}"
    book.endings.note(live.caller.name, live.id, live.about, (live.status, said))
    seq = max(live.log.last + 1, (live.attempts - 1) * FIRST_OF_ATTEMPT)
    live.log.finish(seq, last_line(seq, data))
    _count(book, live, found if isinstance(found, Result) else None)


def _count(book: Book, live: Live, result: Result | None) -> None:
    metrics = book.metrics.of(live.caller.name)
    metrics.ended.add(status=live.status or "error")
    if result is not None:
        usage = result.usage
        for one in result.violations:
            metrics.denials.add(one.count, kind=one.kind)
        if live.started is not None:
            metrics.setup_time.observe(result.timing.setup)
        if usage.wall_time is not None:
            metrics.run_time.observe(usage.wall_time)
        if usage.cpu_time is not None:
            metrics.cpu.add(usage.cpu_time)
            book.spending.spent(live.caller.name, usage.cpu_time)
    about = {"caller": live.caller.name, "job": live.id, "status": live.status}
    tell(logger, "job over", {**about, "traceparent": live.about.traceparent})
