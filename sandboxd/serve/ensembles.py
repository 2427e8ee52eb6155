"""Jobs that run together: a group, or a pipeline. They wait as one, begin as one and end as one.

Theory of operation. A group or a pipeline belongs to its connection and is in no journal, because
nothing is promised of it before its end; in the queue it is a guest (guests.py), which waits for
all slots that it needs. What runs are jobs like any others: each has an id, events, hands on it,
and a record that is kept. One task waits for the place and starts them; each is followed by one of
its own. Who reads the events of all of them reads the logs in turn, a piece of each.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack

import trio

from sandboxd.errors import InternalError, SandboxError
from sandboxd.job import Job
from sandboxd.result import Result, error_json
from sandboxd.serve import carry
from sandboxd.serve.book import Book
from sandboxd.serve.callers import Caller
from sandboxd.serve.done import Done
from sandboxd.serve.ensemble import (
    GroupSubmission,
    GroupView,
    PipelineSubmission,
    PipelineView,
    bodies,
    end_line,
    group_of,
    member_line,
    named,
    parts,
    pipes_of,
    place_of,
)
from sandboxd.serve.guests import Cancelled, Guest, placed
from sandboxd.serve.live import Asked, Live, view
from sandboxd.serve.log import QUIET, Reader
from sandboxd.serve.share import Need, Waiting, together
from sandboxd.serve.wire import Refusal, State, decode, refusal_of, submission
from sandboxd.supervise import groups, pipeline
from sandboxd.supervise.groups import GroupRun
from sandboxd.supervise.pipeline import Pipeline
from sandboxd.supervise.record import moment
from sandboxd.supervise.runner import Runner

Kind = type[GroupSubmission] | type[PipelineSubmission]
Wanted = GroupSubmission | PipelineSubmission
Running = GroupRun | Pipeline
Begin = Callable[[], AbstractAsyncContextManager[Running]]

logger = logging.getLogger("sandboxd.serve")


class Ensemble:
    """A group or a pipeline that is not over; `lives` are its jobs, by their names in it."""

    def __init__(
        self, which: tuple[Kind, str], guest: Guest, lives: Mapping[str, Live], begin: Begin
    ) -> None:
        self.kind, self.id = which
        self.guest = guest
        self.lives = lives
        self.begin = begin
        self.setup = trio.CancelScope()
        """Of what comes between its place and its runs."""
        self.results: dict[str, Result] = {}
        self.ended_by: str | None = None
        self.decisive: str | None = None
        self.done = Done()
        self.changed = trio.Event()
        for live in lives.values():
            live.log.heard = self.tell

    def tell(self) -> None:
        """Something has happened: to who reads all of it."""
        self.changed.set()
        self.changed = trio.Event()

    def cancel(self) -> None:
        """All of it ends, or never begins."""
        if self.done.is_set():
            return
        for live in self.lives.values():
            live.cancelled = True
            live.log.hurry()
        self.guest.kill()
        if not self.guest.runs:
            self.setup.cancel()

    @property
    def refused(self) -> Refusal | None:
        """Why there will be no results."""
        return next((one.refused for one in self.lives.values() if one.refused), None)

    def view(self) -> GroupView | PipelineView:
        state: State = "queued" if self.guest.started is None else "running"
        state = "done" if self.done.is_set() else state
        created, views = moment(self.guest.created), {n: view(v) for n, v in self.lives.items()}
        if self.kind is PipelineSubmission:
            jobs = tuple(views.values())
            return PipelineView(id=self.id, state=state, created_at=created, jobs=jobs)
        return GroupView(
            id=self.id,
            state=state,
            created_at=created,
            ended_by=self.ended_by,
            decisive=self.decisive,
            members=views,
        )


class Ensembles:
    """Those of a book."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._live: dict[tuple[Kind, str, str], Ensemble] = {}

    def find(self, kind: Kind, caller: Caller, name: str) -> Ensemble | None:
        """One of this caller's that is not over."""
        return self._live.get((kind, caller.name, name))

    # -- taking on

    async def submit(self, kind: Kind, caller: Caller, asked: tuple[bytes, str | None]) -> Ensemble:
        """All of its jobs, or none: then it is a Refusal. `asked`: the body and a traceparent."""
        wanted: Wanted = decode(asked[0], kind)
        every = parts(wanted)
        name = wanted.id or os.urandom(16).hex()
        ids = {one: every[one].id or f"{name}.{one}" for one in every}
        coming = {(caller.name, f"id {one}") for one in ids.values()}
        if len(coming) < len(ids) or self._book.coming & coming:
            raise _taken("an id is there twice")
        self._book.coming |= coming
        try:
            if self.find(kind, caller, name) is not None:
                raise _taken(f"{name!r} is running already")
            for one in ids.values() if wanted.id or any(job.id for job in every.values()) else ():
                if await self._book.find(caller, one, whole=False) is not None:
                    raise _taken(f"there is a job {one!r}")
            return self._take_on(caller, wanted, (name, ids), asked[1])
        except Refusal as refusal:
            self._book.metrics.of(caller.name).refused.add(len(ids), why=refusal.kind)
            raise
        finally:
            self._book.coming -= coming

    def _take_on(
        self,
        caller: Caller,
        wanted: Wanted,
        names: tuple[str, Mapping[str, str]],
        trace: str | None,
    ) -> Ensemble:
        book, (name, ids) = self._book, names
        lives: dict[str, Live] = {}
        with ExitStack() as held:
            for one, body in bodies(wanted).items():
                stack = held.enter_context(ExitStack())
                asked = Asked(
                    submission(body), body, attached=True, followed=True, traceparent=trace
                )
                try:
                    book.check(caller, asked.wanted)
                    lives[one] = book.make(caller, asked, ids[one], stack)
                except Refusal as refusal:
                    raise named(refusal, place_of(wanted, one)) from None
                lives[one].held = stack
                lives[one].waiting.gone = True  # it waits with the others
            try:
                begin = _beginning(book.runner, wanted, lives)
            except SandboxError as error:
                raise refusal_of(error, error_json(error)) from None
            need = self._need(wanted, lives.values())
            about = next(iter(lives.values())).about
            waiting = Waiting(caller.name, wanted.priority, need)
            guest = Guest(caller, about, waiting, lives=tuple(lives.values()))
            book.admit(guest)
            held.pop_all()
        found = Ensemble((type(wanted), name), guest, lives, begin)
        self._live[found.kind, caller.name, name] = found
        book.begin(self._carry_out, found)
        return found

    def _need(self, wanted: Wanted, lives: Iterable[Live]) -> Need:
        """Refusal if it could wait for ever."""
        needs = [live.waiting.need for live in lives]
        pipes = isinstance(wanted, PipelineSubmission)
        need = together(needs, self._book.runner.slots if pipes else len(needs))
        if need.slots > (most := self._book.share.most_running):
            why = f"{len(needs)} jobs together, and {most} of yours may run at once"
            hint = "a smaller one; or who runs the daemon: --slots, --quota-running"
            raise Refusal(422, "job", why, hint=hint)
        return need

    # -- carrying out

    async def _carry_out(self, one: Ensemble) -> None:
        book, lives = self._book, one.lives.values()
        try:
            async with placed(book, one.guest):
                failure = await self._run(one)
            for live in lives:
                if not live.done.is_set() and failure is None:
                    await carry.never_started(book, live)
                elif not live.done.is_set() and failure is not None:
                    await carry.end(book, live, failure)
                    book.over(live)
        except Cancelled:  # while it waited
            for live in lives:
                await carry.never_started(book, live)
        except Refusal:  # the daemon goes down
            pass
        finally:
            for live in lives:
                if not live.done.is_set():
                    live.refused = carry.going_down()
                    book.over(live)
            del self._live[one.kind, one.guest.caller.name, one.id]
            one.done.set()
            one.tell()

    async def _run(self, one: Ensemble) -> SandboxError | None:
        """Why there are no results of those that are not over; None if they never began."""
        try:
            with one.setup:
                async with one.begin() as running:
                    if not one.setup.cancel_called:
                        await self._follow(one, running)
        except SandboxError as error:
            return error
        except Exception as error:
            logger.exception("jobs failed", extra={"caller": one.guest.caller.name, "job": one.id})
            why = f"{type(error).__name__}: {error}"
            return InternalError(why, hint="the daemon's log says more")
        return None

    async def _follow(self, one: Ensemble, running: Running) -> None:
        """All of them, to the end."""
        runs = running.runs.values() if isinstance(running, GroupRun) else running.runs
        one.guest.runs, started = tuple(runs), time.time()
        one.guest.begun.set()
        for live, run in zip(one.lives.values(), one.guest.runs, strict=True):
            live.state, live.started, live.attempts = "running", started, 1
            carry.begin(live, run)
        async with trio.open_nursery() as nursery:
            for number, name in enumerate(one.lives):
                nursery.start_soon(self._member, one, running, (number, name))
        if isinstance(running, GroupRun):
            await running.wait_over()
            one.ended_by = running.ended_by
            if len(one.results) == len(one.lives):
                one.decisive = running.decisive(one.results)

    async def _member(self, one: Ensemble, running: Running, which: tuple[int, str]) -> None:
        number, name = which
        live, run = one.lives[name], one.guest.runs[number]
        found: Result | SandboxError
        try:
            await carry.pass_on(live, run)
            waited = run.wait() if isinstance(running, GroupRun) else running.result(number)
            found = await carry.kept(self._book, live, await waited)
            one.results[name] = found
        except SandboxError as error:
            found = error
            if isinstance(running, Pipeline):  # a group does so itself
                for other in running.runs:
                    other.kill(f"job {number} of its pipeline could not be run")
        await carry.end(self._book, live, found)
        self._book.over(live)

    # -- telling

    async def lines(
        self, one: Ensemble, readers: Mapping[str, Reader]
    ) -> AsyncGenerator[list[bytes], None]:
        """Events of all of them, and the end; an empty list where nothing happens."""
        while True:
            changed, over, quiet = one.changed, one.done.is_set(), True
            for name, live in one.lives.items():
                if lines := await live.log.some(readers[name]):
                    quiet = False
                    yield [member_line(line, name) for line in lines]
                    live.log.passed(readers[name], lines)
            if quiet and over:
                if one.refused is None:
                    yield [end_line(one.view())]
                return
            if quiet:
                with trio.move_on_after(QUIET) as silence:
                    await changed.wait()
                if silence.cancelled_caught:
                    yield []


def _beginning(runner: Runner, wanted: Wanted, lives: Mapping[str, Live]) -> Begin:
    """What starts it; SandboxError if it cannot be."""
    usage_every = wanted.usage_every
    jobs: dict[str, Job] = {name: live.job for name, live in lives.items() if live.job is not None}
    if isinstance(wanted, GroupSubmission):
        group = group_of(wanted, jobs)
        groups.check(group)
        return functools.partial(runner.start_group, group, usage_every=usage_every)
    pipes, every = pipes_of(wanted), list(jobs.values())
    pipeline.check(every, pipes)
    return functools.partial(runner.start_pipeline, every, pipes, usage_every=usage_every)


def _taken(why: str) -> Refusal:
    return Refusal(409, "conflict", why, hint="another id")
