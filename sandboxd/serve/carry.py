"""One job from its slot to its record: run, followed, collected, written down, told."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

import trio

from sandboxd.errors import InternalError, SandboxError
from sandboxd.job import Job
from sandboxd.result import Artifact, Result, failure_json, to_json
from sandboxd.serve.live import Live
from sandboxd.serve.wire import FIRST_OF_ATTEMPT, Refusal, encode, event_line, last_line, submission
from sandboxd.supervise.run import Run

if TYPE_CHECKING:
    from sandboxd.serve.book import Book

STALLED = 300.0
"""Seconds after which a job is killed that waits for a reader who takes nothing."""

logger = logging.getLogger("sandboxd.serve")


def going_down() -> Refusal:
    refusal = Refusal(503, "draining", "the daemon is going down", hint="ask again in a moment")
    return refusal.with_header("Retry-After", "5")


async def carry_out(book: Book, live: Live) -> None:
    """A job that has its slot."""
    live.state, live.started = "running", time.time()
    live.attempts += 1
    book.metrics.queue_time.observe(max(0.0, live.started - live.created))
    began = time.monotonic()
    try:
        record, result = await _run(book, live)
        await _end(book, live, record, result)
    except trio.Cancelled:
        live.refused = going_down()  # in the journal it still runs: the next daemon decides
        raise
    finally:
        book.share.give_back(live.waiting, time.monotonic() - began)
        book.over(live)


async def never_started(book: Book, live: Live) -> None:
    """A job that was cancelled while it waited."""
    try:
        job = await _job(book, live)
        result = book.runner.never_started(job, time.time() - live.created)
        await _end(book, live, to_json(result), result)
    except SandboxError as error:
        await _end(book, live, failure_json(error), None)
    finally:
        book.over(live)


async def _run(book: Book, live: Live) -> tuple[dict[str, Any], Result | None]:
    """The record, and the result if there is one."""
    try:
        if not live.asked.attached:
            await book.journal.start(live.caller.name, live.id, live.attempts)
        job = await _job(book, live)
        every = live.asked.wanted.usage_every
        async with book.runner.start(job, usage_every=every) as run:
            live.run = run
            live.begun.set()
            if live.cancelled:
                run.kill()
            result = await _follow(live, run)
        return await _record(book, live, result), result
    except SandboxError as error:
        return failure_json(error), None
    except Refusal as refusal:  # a file it names has gone
        return failure_json(SandboxError(str(refusal), hint=refusal.hint)), None
    except Exception as error:
        logger.exception("job failed", extra={"caller": live.caller.name, "job": live.id})
        told = InternalError(f"{type(error).__name__}: {error}", hint="the daemon's log says more")
        return failure_json(told), None


async def _job(book: Book, live: Live) -> Job:
    """What the journal has is read when it is needed, so that what waits takes no memory."""
    if live.job is not None:
        return live.job
    row = await book.journal.find(live.caller.name, live.id)
    if row is None or row.request is None:
        raise InternalError(f"the journal has no request of {live.id}")
    return book.job(live.caller.name, submission(row.request), live.id)


async def _follow(live: Live, run: Run) -> Result:
    """Pass its events on, at the pace of who reads them."""
    async for event in run.events:
        if event.result is not None:
            continue
        seq, line = event_line(event, live.attempts)
        with trio.move_on_after(STALLED) as patience:
            await live.log.append(seq, line)
        if patience.cancelled_caught:
            live.log.hurry()
            run.kill()
    return await run.wait()


async def _record(book: Book, live: Live, result: Result) -> dict[str, Any]:
    """The record; what was collected is a file of the caller's then."""
    record = to_json(result)
    for artifact in result.artifacts:
        if not await trio.to_thread.run_sync(_save, book, live, artifact):
            reason = "not kept: the caller's files take up too much"
            record["artifact_errors"].append({"path": artifact.path, "reason": reason})
    return record


def _save(book: Book, live: Live, artifact: Artifact) -> bool:
    return book.files.save(live.caller.name, artifact.sha256, artifact.data)


async def _end(book: Book, live: Live, record: dict[str, Any], result: Result | None) -> None:
    await live.log.settle()
    live.ended = time.time()
    live.status = record["status"]
    data = encode(record)
    events = live.log.lines()
    kept = None if events is None else b"\n".join(events)
    row = dataclasses.replace(live.row(), result=data, events=kept)
    size = len(data) + (len(kept) if kept is not None else book.settings.events)
    try:
        await book.journal.finish(row, size, known=not live.asked.attached)
    except SandboxError as error:  # who waits for it shall have it nevertheless
        logger.error("result not written", extra={"job": live.id, "why": str(error)})
    live.record, live.state = data, "done"
    book.endings.note(live.caller.name, live.id, live.about, record)
    seq = max(live.log.last + 1, (live.attempts - 1) * FIRST_OF_ATTEMPT)
    live.log.finish(seq, last_line(seq, data))
    _count(book, live, result)


def _count(book: Book, live: Live, result: Result | None) -> None:
    metrics = book.metrics
    metrics.ended.add(status=live.status or "error")
    about = {"caller": live.caller.name, "job": live.id, "status": live.status}
    if live.about.traceparent is not None:
        about["traceparent"] = live.about.traceparent
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
    logger.info("job over", extra=about)
