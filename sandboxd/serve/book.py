"""The jobs: taken on, waiting, running, done. Each that runs has a task of its own.

Theory of operation. An accepted job is in the journal before its caller hears of it; one whose
caller waits on the connection (`attached`) is not, for nothing was promised before its end. A job
is marked as running in the journal before it gets a sandbox, and its result is there before
anybody is told. So whatever moment the daemon dies at, the next one knows what it may have started,
and starts nothing a second time that did not ask for that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from sandboxd.errors import SandboxError
from sandboxd.job import Job
from sandboxd.policy import Policy
from sandboxd.result import error_json
from sandboxd.serve import carry, upkeep
from sandboxd.serve.callers import Caller
from sandboxd.serve.files import Files
from sandboxd.serve.guests import Guest
from sandboxd.serve.journal import BatchRow, Journal, Row
from sandboxd.serve.live import About, Asked, Batch, Live
from sandboxd.serve.log import Log
from sandboxd.serve.lookout import Lookout
from sandboxd.serve.metrics import Metrics
from sandboxd.serve.overview import Endings
from sandboxd.serve.quotas import Quotas, Spending
from sandboxd.serve.share import Need, Share, Waiting, need_of
from sandboxd.serve.wire import (
    Refusal,
    Submission,
    digests,
    job_of,
    refusal_of,
    words,
)
from sandboxd.supervise.policies import is_path
from sandboxd.supervise.runner import Runner

TURN = 50
"""Cases of a batch that are looked at before others have their turn."""
SMALL = 4096
"""Bytes of a request that is kept in memory while its job waits; a larger one is read again."""

logger = logging.getLogger("sandboxd.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What whoever started the daemon decided."""

    state: Path
    quotas: Quotas
    room: Need
    """CPUs and memory of all running jobs together."""
    apart: bool = False
    """Whether callers have tenants of their own."""
    events: int = 16 << 20
    """Bytes of a job's events that are kept."""
    age: float = 7 * 86400.0
    """Seconds that results and files are kept."""
    size: int = 4 << 30
    """Bytes of results that are kept."""


class Stored(Protocol):
    """Files of callers."""

    def total(self) -> int: ...

    def stored(self, caller: str) -> int: ...


class Book:
    """All jobs that are not over, and the way to those that are. Made by `open_book`."""

    def __init__(
        self, runner: Runner, journal: Journal, settings: Settings, lookout: Lookout
    ) -> None:
        self.runner = runner
        self.journal = journal
        self.settings = settings
        self.metrics = Metrics()
        self.endings = Endings()
        self.files = Files(settings.state / "files", settings.quotas.stored)
        self.stores: list[Stored] = [self.files]
        """Where callers have something stored."""
        self.share = Share(runner.slots, settings.room, settings.quotas.running)
        self.spending = Spending(settings.quotas)
        self.lookout = lookout
        self.draining = False
        self.replying = 0
        """Requests whose replies are not sent."""
        self.live: dict[tuple[str, str], Live] = {}
        self.ending = 0
        """Jobs that have run, and whose results are being written."""
        self.coming: set[tuple[str, str]] = set()
        """Callers, and the ids and keys of what is being taken on for them at this moment."""
        self._keys: dict[tuple[str, str], Live] = {}
        self.guests: dict[str, Guest] = {}
        self._queue: dict[Waiting, Live | Guest] = {}
        self._bodies: Counter[str] = Counter()
        """Caller -> bytes of requests whose jobs are not over."""
        self._changed = trio.Event()
        self._jobs: trio.Nursery | None = None

    def stored(self) -> int:
        """Bytes of files of all callers."""
        return sum(one.total() for one in self.stores)

    def stored_of(self, caller: str) -> int:
        return sum(one.stored(caller) for one in self.stores)

    # -- taking on

    async def submit(self, caller: Caller, asked: Asked) -> tuple[Live | Row, bool]:
        """The job, and whether it is new; Refusal if it is not taken on."""
        try:
            self.check(caller, asked.wanted)
            return await self._submit(caller, asked)
        except Refusal as refusal:
            self.metrics.of(caller.name).refused.add(why=refusal.kind)
            raise

    async def _submit(self, caller: Caller, asked: Asked) -> tuple[Live | Row, bool]:
        job_id = asked.wanted.id or os.urandom(16).hex()
        names = {(caller.name, f"id {job_id}")}
        if asked.key is not None:
            names.add((caller.name, f"key {asked.key}"))
        if self.coming & names:
            raise Refusal(
                409,
                "conflict",
                "the same is being submitted at this moment",
                hint="ask again in a moment",
            ).with_header("Retry-After", "1")
        self.coming |= names
        try:
            if (known := await self._known(caller, asked)) is not None:
                return known, False
            if asked.wanted.id and await self.find(caller, job_id) is not None:
                raise Refusal(409, "conflict", f"there is a job {job_id!r}", hint="another id")
            return await self._take_on(caller, asked, job_id), True
        finally:
            self.coming -= names

    def check(self, caller: Caller, wanted: Submission) -> None:
        """Refusal if this caller may not have such a job."""
        policy = wanted.policy
        if self.draining:
            raise carry.going_down()
        if wanted.keep_root and not caller.operator:
            raise Refusal(
                403,
                "denied",
                "keep_root is for the daemon's own user, whose store it goes to",
                hint="collect what is to be kept",
            )
        if isinstance(policy, Policy):
            if not caller.operator:
                raise Refusal(
                    403,
                    "denied",
                    "a policy of one's own is for the daemon's own user",
                    hint="name one of GET /v1/policies",
                )
        elif is_path(policy):
            raise Refusal(
                422,
                "policy",
                f"policy {policy!r} is a path",
                hint="over the wire a policy is named, or sent whole",
            )

    async def _known(self, caller: Caller, asked: Asked) -> Live | Row | None:
        """The job that was submitted with this key before."""
        if asked.key is None:
            return None
        found: Live | Row | None = self._keys.get((caller.name, asked.key))
        found = found or await self.journal.find_key(caller.name, asked.key)
        if found is None:
            return None
        digest = found.asked.digest if isinstance(found, Live) else found.body
        if digest != asked.digest:
            raise Refusal(
                422,
                "conflict",
                "this Idempotency-Key came with another job before",
                hint="a new job needs a new key",
            )
        return found if isinstance(found, Live) else await self.find(caller, found.id)

    async def take_on_all(
        self, caller: Caller, asked: Sequence[Asked], batch: BatchRow, hears: Batch
    ) -> list[Live]:
        """The cases of a batch: all of them, or none."""
        try:
            for number, one in enumerate(asked):
                self.check(caller, one.wanted)
                if not number % TURN:
                    await trio.lowlevel.checkpoint()
            return await self._take_on_all(caller, asked, batch, hears)
        except Refusal as refusal:
            self.metrics.of(caller.name).refused.add(len(asked), why=refusal.kind)
            raise

    async def _take_on_all(
        self, caller: Caller, asked: Sequence[Asked], batch: BatchRow, hears: Batch
    ) -> list[Live]:
        size = sum(len(one.body) for one in asked)
        self.spending.check(caller.name, self.share, len(asked))
        self.spending.check_bodies(self._bodies[caller.name] + size)
        cases: list[Live] = []
        with ExitStack() as held:
            for name, one in zip(batch.names, asked, strict=True):
                if not len(cases) % TURN:
                    await trio.lowlevel.checkpoint()
                stack = held.enter_context(ExitStack())
                live = self.make(caller, one, name, stack)
                live.batch = hears
                live.held = stack
                cases.append(live)
            rows = [live.row(one.body) for live, one in zip(cases, asked, strict=True)]
            await self.journal.accept(*rows, batch=batch)
            held.pop_all()
        for live in cases:
            live.job = live.job if live.size <= SMALL else None
            self.enqueue(live)
        self.metrics.of(caller.name).accepted.add(len(cases))
        return cases

    async def _take_on(self, caller: Caller, asked: Asked, job_id: str) -> Live:
        if self.draining:  # since the journal was asked
            raise carry.going_down()
        self.spending.check(caller.name, self.share)
        self.spending.check_bodies(self._bodies[caller.name] + len(asked.body))
        held = ExitStack()
        try:
            live = self.make(caller, asked, job_id, held)
            if not asked.attached:
                await self.journal.accept(live.row(asked.body))
                if live.size > SMALL:
                    live.job = None
        except BaseException:
            held.close()
            raise
        live.held = held
        self.enqueue(live)
        self.metrics.of(caller.name).accepted.add()
        return live

    def make(self, caller: Caller, asked: Asked, job_id: str, held: ExitStack) -> Live:
        """A job that nobody knows of yet; Refusal if it cannot be right."""
        wanted = asked.wanted
        held.enter_context(self.files.pinned(caller.name, digests(wanted)))
        try:
            job = self.job(caller.name, wanted, job_id)
            policy = self.runner.policy(job)
        except SandboxError as error:
            raise refusal_of(error, error_json(error)) from None
        name, trace = policy.name, asked.traceparent
        folder = None if asked.attached else self.folder(caller.name, job_id)
        return Live(
            caller=caller,
            id=job_id,
            about=About(
                argv=words(wanted), policy=name, priority=wanted.priority, traceparent=trace
            ),
            asked=asked.slim(),
            size=len(asked.body),
            log=Log(folder, self.settings.events, stall=wanted.overflow == "stall"),
            waiting=Waiting(caller.name, wanted.priority, need_of(policy)),
            created=time.time(),
            job=job,
            turn=trio.Event() if asked.here else None,
        )

    def job(self, caller: str, wanted: Submission, job_id: str) -> Job:
        domain = caller if self.settings.apart else None
        return job_of(wanted, (job_id, domain), lambda digest: self.files.path(caller, digest))

    def folder(self, caller: str, job_id: str) -> Path:
        """Where a job's events go when there are many."""
        name = hashlib.sha256(f"{caller}\0{job_id}".encode()).hexdigest()[:40]
        return self.settings.state / "logs" / name

    def enqueue(self, live: Live) -> None:
        """A job that was taken on waits for its slot."""
        self._enter(live)
        self._queue[live.waiting] = live
        self.share.add(live.waiting)
        self.changed()

    def _enter(self, live: Live) -> None:
        self.live[live.caller.name, live.id] = live
        if live.asked.key is not None:
            self._keys[live.caller.name, live.asked.key] = live
        self._bodies[live.caller.name] += live.size

    def changed(self) -> None:
        """Something was queued, or is over: start what may be started."""
        while not self.draining and self._jobs and (waiting := self.share.next()) is not None:
            next_one = self._queue.pop(waiting)
            if isinstance(next_one, Guest):
                next_one.given.set()
            elif not next_one.take_turn():
                self._jobs.start_soon(carry.carry_out, self, next_one)
        if self.draining:
            self._changed.set()
            self._changed = trio.Event()

    def admit(self, guest: Guest) -> None:
        """Into the queue with the jobs; Refusal if it is not taken on."""
        if self.draining:
            raise carry.going_down()
        name, lives = guest.caller.name, guest.lives
        self.spending.check(name, self.share, guest.waiting.need.slots)
        self.spending.check_bodies(self._bodies[name] + sum(live.size for live in lives))
        for live in lives:
            self._enter(live)
        self.guests[guest.id] = guest
        self._queue[guest.waiting] = guest
        self.share.add(guest.waiting)
        self.metrics.of(name).accepted.add(max(1, len(lives)))
        self.changed()

    def leave(self, guest: Guest, seconds: float) -> None:
        """A guest is over, after so many seconds in its place, or gives up waiting."""
        del self.guests[guest.id]
        if self.share.remove(guest.waiting):
            self._queue.pop(guest.waiting, None)
        elif guest.refused is None:
            self.share.give_back(guest.waiting, seconds)
        self.changed()

    # -- asking for

    async def find(self, caller: Caller, job_id: str, *, whole: bool = True) -> Live | Row | None:
        """A job of this caller's; `whole` is with its result."""
        found = self.live.get((caller.name, job_id))
        return found or await self.journal.find(caller.name, job_id, whole=whole)

    async def cancel(self, live: Live) -> None:
        """It ends, or never begins. Its record comes in a moment."""
        live.cancelled = True
        if self.withdraw(live):
            await carry.never_started(self, live)
        elif live.run is not None:
            live.log.hurry()
            live.run.kill()

    def withdraw(self, live: Live) -> bool:
        """It waits no more; whether it did."""
        if not self.share.remove(live.waiting):
            return False
        self._queue.pop(live.waiting, None)
        return True

    def leave_slot(self, live: Live) -> None:
        """Its slot, if it still has one, goes to who is next."""
        if live.slotted is not None:
            self.share.give_back(live.waiting, time.monotonic() - live.slotted)
            live.slotted = None
            self.changed()

    def over(self, live: Live) -> None:
        """It is neither waiting nor running any more."""
        self.live.pop((live.caller.name, live.id), None)
        if live.asked.key is not None:
            self._keys.pop((live.caller.name, live.asked.key), None)
        self._bodies[live.caller.name] -= live.size
        if not self._bodies[live.caller.name]:
            del self._bodies[live.caller.name]
        if live.held is not None:
            live.held.close()
        live.begun.set()
        live.done.set()
        if live.turn is not None:
            live.turn.set()
        if live.batch is not None:
            live.batch.over(live)
        self.changed()

    def soon(self, live: Live) -> None:
        """Cancel it without waiting for that."""
        self.begin(self.cancel, live)

    def begin(self, work: Callable[..., Awaitable[object]], *what: object) -> None:
        """Something that takes as long as it takes, but no longer than the book is open."""
        if self._jobs is not None:
            self._jobs.start_soon(work, *what)

    # -- the end

    @contextmanager
    def reply(self) -> Iterator[None]:
        """Somebody waits for a reply meanwhile: who goes down lets it be sent."""
        self.replying += 1
        try:
            yield
        finally:
            self.sent()

    def sent(self) -> None:
        """A reply that was counted in `replying` is sent, or cannot be."""
        self.replying -= 1
        if self.draining:
            self.changed()

    async def replied(self) -> None:
        """Returns when no request waits for its reply any more."""
        while self.replying:
            await self._changed.wait()

    async def drain(self, seconds: float) -> bool:
        """Start nothing more and let what runs end; whether all of it did in this time."""
        self.draining = True
        for waiting, live in list(self._queue.items()):
            if isinstance(live, Guest):
                self.share.remove(waiting)
                del self._queue[waiting]
                live.refuse(carry.going_down())
            elif live.asked.attached and self.share.remove(waiting):
                del self._queue[waiting]
                live.refused = carry.going_down()
                self.over(live)
        with trio.move_on_after(seconds):
            while self.share.running or self.ending:
                await self._changed.wait()
        return not (self.share.running or self.ending)


@asynccontextmanager
async def open_book(runner: Runner, journal: Journal, settings: Settings) -> AsyncIterator[Book]:
    """The book, going on where the last daemon stopped; leaving it cancels what runs."""
    with closing(Lookout()) as lookout:
        book = Book(runner, journal, settings, lookout)
        await upkeep.recover(book)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upkeep.keep_small, book)
            nursery.start_soon(lookout.work)
            book._jobs = nursery
            book.changed()
            try:
                yield book
            finally:
                book.draining = True
            nursery.cancel_scope.cancel()
