"""A job that is not over, and how jobs are told of."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import trio

from sandboxd.job import Job
from sandboxd.serve.callers import Caller
from sandboxd.serve.done import Done
from sandboxd.serve.journal import Row
from sandboxd.serve.log import Log
from sandboxd.serve.share import Waiting
from sandboxd.serve.wire import JobView, Refusal, State, Submission, encode
from sandboxd.supervise.record import moment
from sandboxd.supervise.run import Hands

SLIM = 1024
"""Bytes of a request that may be held until its job is over."""


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal keeps of a submission for as long as it keeps the job."""

    argv: tuple[str, ...]
    policy: str
    priority: int
    traceparent: str | None = None


class Asked(msgspec.Struct, frozen=True):
    """A submission and how it came."""

    wanted: Submission
    body: bytes
    attached: bool = False
    """Its caller waits on the connection: it ends with that, and is in the journal afterwards."""
    followed: bool = False
    """Its caller reads the events on the connection, and wants each at once."""
    here: bool = False
    """And carries it out in a task of its own, which has nothing else to do."""
    key: str | None = None
    """Idempotency-Key."""
    digest: bytes | None = None
    """SHA-256 of the body, where there is a key."""
    traceparent: str | None = None

    def slim(self) -> Asked:
        """What a job needs of it while it waits: thousands may, and their files with them."""
        if len(self.body) <= SLIM:
            return self
        usage_every = self.wanted.usage_every
        return msgspec.structs.replace(
            self, wanted=Submission(argv=("",), usage_every=usage_every), body=b""
        )


class Batch(Protocol):
    """Hears of the end of its cases."""

    def over(self, live: Live) -> None: ...


@dataclass(eq=False, slots=True)
class Live:
    """A job that is not over."""

    caller: Caller
    id: str
    about: About
    asked: Asked
    log: Log
    waiting: Waiting
    created: float
    size: int = 0
    """Bytes of its request."""
    held: ExitStack | None = None
    """What it keeps from being removed."""
    job: Job | None = None
    """None while it waits and is large: it is read from the journal when it is started."""
    attempts: int = 0
    state: State = "queued"
    started: float | None = None
    slotted: float | None = None
    """Since when it has a slot, by the monotonic clock."""
    ended: float | None = None
    run: Hands | None = None
    record: bytes | None = None
    status: str | None = None
    batch: Batch | None = None
    """What it is a case of."""
    refused: Refusal | None = None
    """Why there will be no result: the daemon is going down."""
    cancelled: bool = False
    begun: trio.Event = field(default_factory=trio.Event)
    """It runs, or will not any more."""
    done: Done = field(default_factory=Done)
    turn: trio.Event | None = None
    """Where a task waits to carry it out: it has its slot, or is over."""

    def take_turn(self) -> bool:
        """It has its slot; whether a task waits to carry it out."""
        if self.turn is None:
            return False
        self.slotted = time.monotonic()
        self.turn.set()
        return True

    def row(
        self,
        request: bytes | None = None,
        result: bytes | None = None,
        events: bytes | None = None,
    ) -> Row:
        """What the journal keeps of it; it is told of its end before anybody else is."""
        return Row(
            0,
            self.caller.name,
            self.id,
            self.state,
            encode(self.about),
            request,
            self.asked.key,
            self.asked.digest,
            self.created,
            self.started,
            self.ended,
            self.attempts,
            self.status,
            result,
            events,
        )


def view(found: Live | Row, *, brief: bool = False) -> JobView:
    """How a job is told of; `brief` is without its record."""
    if isinstance(found, Live):
        about, record = found.about, found.record
    else:
        about, record = msgspec.json.decode(found.about, type=About), found.result
    return JobView(
        id=found.id,
        state=found.state,  # type: ignore[arg-type]
        argv=about.argv,
        policy=about.policy,
        priority=about.priority,
        attempts=found.attempts,
        created_at=moment(found.created),
        started_at=None if found.started is None else moment(found.started),
        ended_at=None if found.ended is None else moment(found.ended),
        status=found.status,
        traceparent=about.traceparent,
        result=None if record is None or brief else msgspec.Raw(record),
    )
