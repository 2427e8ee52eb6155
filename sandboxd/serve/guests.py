"""What takes part in the queue without being a job of the journal's: another protocol's runs.

A guest waits for its place as every job does, by the same shares, quotas and room, and is counted
and shown with them. It belongs to its connection and is in no journal. Jobs that run together
(ensembles.py) wait as one guest, too; what is told of them is told of each.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from sandboxd.result import Result
from sandboxd.serve.callers import Caller
from sandboxd.serve.live import About, Live
from sandboxd.serve.share import Waiting
from sandboxd.serve.wire import Refusal
from sandboxd.supervise.run import Run

if TYPE_CHECKING:
    from sandboxd.serve.book import Book

logger = logging.getLogger("sandboxd.serve")


@dataclass(eq=False, slots=True)
class Guest:
    """A request that waits, or runs: one program of another protocol's, or several together."""

    caller: Caller
    about: About
    waiting: Waiting
    id: str = field(default_factory=lambda: os.urandom(16).hex())
    created: float = field(default_factory=time.time)
    started: float | None = None
    runs: tuple[Run, ...] = ()
    lives: tuple[Live, ...] = ()
    """The jobs that it is, where it is some."""
    cancelled: bool = False
    refused: Refusal | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of its waiting."""
    given: trio.Event = field(default_factory=trio.Event)
    """It has its place, or was refused."""
    begun: trio.Event = field(default_factory=trio.Event)
    """Its `runs` are there."""

    @property
    def state(self) -> str:
        return "queued" if self.started is None else "running"

    def kill(self) -> None:
        """End it, or its waiting."""
        self.cancelled = True
        self.scope.cancel()
        for run in self.runs:
            run.kill()

    def refuse(self, refusal: Refusal) -> None:
        self.refused = refusal
        self.given.set()


class Cancelled(Exception):
    """It was cancelled while it waited."""


@asynccontextmanager
async def admitted(book: Book, guest: Guest) -> AsyncIterator[None]:
    """A place among what runs. Refusal if there will be none, Cancelled if it was given up."""
    admit(book, guest)
    async with placed(book, guest):
        yield


def admit(book: Book, guest: Guest) -> None:
    """Into the queue; Refusal if it is not taken on. Its place is given back by `placed`."""
    try:
        book.admit(guest)
    except Refusal as refusal:
        counts = book.metrics.of(guest.caller.name)
        counts.refused.add(max(1, len(guest.lives)), why=refusal.kind)
        raise


@asynccontextmanager
async def placed(book: Book, guest: Guest) -> AsyncIterator[None]:
    """The place of a guest that was admitted, as soon as it has one."""
    try:
        with guest.scope:
            await guest.given.wait()
        if guest.refused is not None:
            raise guest.refused
        if not guest.given.is_set():
            raise Cancelled
        guest.started = time.time()
        counts = book.metrics.of(guest.caller.name)
        for _ in guest.lives or (None,):
            counts.queue_time.observe(max(0.0, guest.started - guest.created))
        began = time.monotonic()
        yield
    finally:
        book.leave(guest, 0.0 if guest.started is None else time.monotonic() - began)


def count(book: Book, guest: Guest, status: str, result: Result | None) -> None:
    """What a run of a guest's used, and how it ended."""
    metrics = book.metrics.of(guest.caller.name)
    metrics.ended.add(status=status)
    message = "" if result is None else result.message
    book.endings.note(guest.caller.name, guest.id, guest.about, (status, message))
    about = {"caller": guest.caller.name, "job": guest.id, "status": status}
    if guest.about.traceparent is not None:
        about["traceparent"] = guest.about.traceparent
    logger.info("job over", extra=about)
    if result is None:
        return
    usage = result.usage
    for one in result.violations:
        metrics.denials.add(one.count, kind=one.kind)
    metrics.setup_time.observe(result.timing.setup)
    if usage.wall_time is not None:
        metrics.run_time.observe(usage.wall_time)
    if usage.cpu_time is not None:
        metrics.cpu.add(usage.cpu_time)
        book.spending.spent(guest.caller.name, usage.cpu_time)
