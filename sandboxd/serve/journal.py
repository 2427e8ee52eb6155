"""What the daemon must not forget: accepted jobs, which of them were started, and results.

Theory of operation. One sqlite database in WAL mode with synchronous=FULL, so that what is
committed survives a power cut (sqlite.org/pragma.html#pragma_synchronous). One task writes: it
takes all that waits to be written and commits it together, in a thread; who must be sure waits for
that commit. A job is `running` in the journal before its sandbox is made, and `done` before anybody
hears of its result. So after a crash `queued` jobs were never started, and `running` ones may have
been.

The lock on the directory is held by the open file: it goes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import logging
import math
import os
import sqlite3
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import trio

from sandboxd.errors import HostError
from sandboxd.serve.wire import State

VERSION = 1
PAUSE = 0.2
"""Seconds in which notes are gathered; what somebody waits for is written at once."""
AGAIN = 1.0
"""Seconds after which what could not be written, and must be, is tried again."""
TOGETHER = 32
"""Rows of one statement."""
MOST_AT_ONCE = 512
"""Changes of one commit, and those that may wait without anybody waiting for them."""

_SCHEMA = """
PRAGMA auto_vacuum=INCREMENTAL;
BEGIN;
CREATE TABLE jobs(
  number INTEGER PRIMARY KEY AUTOINCREMENT, caller TEXT NOT NULL, id TEXT NOT NULL,
  state TEXT NOT NULL, about BLOB NOT NULL, request BLOB, key TEXT, body BLOB,
  created REAL NOT NULL, started REAL, ended REAL, attempts INTEGER NOT NULL,
  status TEXT, result BLOB, events BLOB, size INTEGER NOT NULL DEFAULT 0,
  UNIQUE(caller, id));
CREATE UNIQUE INDEX jobs_key ON jobs(caller, key) WHERE key IS NOT NULL;
CREATE INDEX jobs_state ON jobs(state, ended);
PRAGMA user_version=1;
COMMIT;
"""
_BATCHES = """
CREATE TABLE IF NOT EXISTS batches(
  number INTEGER PRIMARY KEY, caller TEXT NOT NULL, id TEXT NOT NULL, key TEXT, body BLOB,
  cases INTEGER NOT NULL, stop TEXT NOT NULL, created REAL NOT NULL, UNIQUE(caller, id));
CREATE UNIQUE INDEX IF NOT EXISTS batches_key ON batches(caller, key) WHERE key IS NOT NULL;
"""
_COLUMNS = """number, caller, id, state, about, request, key, body, created, started, ended,
 attempts, status, result, events"""
_EVENTS = """number, caller, id, state, about, NULL, key, body, created, started, ended,
 attempts, status, NULL, events"""
_ACCEPT = """INSERT INTO jobs(caller, id, state, about, request, key, body, created, attempts,
 size) VALUES(?,?,?,?,?,?,?,?,0,?)"""
_ACCEPT_BATCH = """INSERT INTO batches(caller, id, key, body, cases, stop, created)
 VALUES(?,?,?,?,?,?,?)"""
_FORGET_BATCHES = """DELETE FROM batches WHERE created < ? AND NOT EXISTS (SELECT 1 FROM jobs
 WHERE jobs.caller=batches.caller AND jobs.id>=batches.id||'.' AND jobs.id<batches.id||'/')"""
_BATCH = "SELECT caller, id, key, body, cases, stop, created FROM batches WHERE caller=? AND "
_BRIEF = """number, caller, id, state, about, NULL, key, body, created, started, ended,
 attempts, status, NULL, NULL"""


logger = logging.getLogger("sandboxd.serve")


class Row(msgspec.Struct, frozen=True):
    """A job as the journal has it. Times are seconds since 1970."""

    number: int
    caller: str
    id: str
    state: str
    about: bytes
    request: bytes | None
    key: str | None
    body: bytes | None
    created: float
    started: float | None
    ended: float | None
    attempts: int
    status: str | None
    result: bytes | None
    events: bytes | None


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch as the journal has it: its jobs are `id`.0, `id`.1 and so on."""

    caller: str
    id: str
    key: str | None
    body: bytes | None
    cases: int
    stop: str
    created: float

    @property
    def names(self) -> list[str]:
        return [f"{self.id}.{number}" for number in range(self.cases)]


class Expired(NamedTuple):
    """A job that is over and is to be kept no longer."""

    number: int
    caller: str
    id: str


Statement = tuple[str, tuple[Any, ...]]


@dataclass(slots=True, eq=False)
class _Change:
    statements: tuple[Statement, ...]
    """All of them, or none."""
    written: trio.Event | None
    """For who waits for it."""
    insists: bool = False
    """It is tried again until it is written."""
    error: sqlite3.Error | None = None


class Journal:
    """Made by `open_journal`."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._using = trio.CapacityLimiter(1)
        self._waiting: list[_Change] = []
        self._overdue: list[_Change] = []
        """What could not be written up to now, and when it is tried again."""
        self._again = math.inf
        self._troubled = False
        self._more = trio.Event()
        self._urgent = trio.Event()
        self._committing = False

    # -- writing

    async def write(self, *statements: Statement, insist: bool = False) -> None:
        """All of them or none: returns when they are on disk; HostError if that cannot be had.

        Who insists gets no error: it takes as long as there is no room.
        """
        await self._write(_Change(statements, trio.Event(), insist))

    async def _write(self, change: _Change) -> None:
        assert change.written is not None
        self._add(change)
        self._urgent.set()
        await change.written.wait()
        if change.error is not None:
            raise _failed("written", change.error) from change.error

    async def note(self, sql: str, *values: Any) -> None:
        """It will be on disk in a moment; waits only while too much is on its way there.

        What cannot be written then is told in the log: nobody was promised it.
        """
        written = trio.Event() if len(self._waiting) >= MOST_AT_ONCE else None
        self._add(_Change(((sql, values),), written))
        if written is not None:
            self._urgent.set()
            await written.wait()

    def _add(self, change: _Change) -> None:
        self._waiting.append(change)
        self._more.set()

    async def accept(self, *rows: Row, batch: BatchRow | None = None) -> None:
        """All of them or none: HostError."""
        statements: list[Statement] = []
        for row in rows:
            values = (row.caller, row.id, row.state, row.about, row.request, row.key, row.body)
            statements.append((_ACCEPT, (*values, row.created, len(row.request or b""))))
        if batch is not None:
            statements.append((_ACCEPT_BATCH, dataclasses.astuple(batch)))
        await self.write(*statements)

    async def start(self, caller: str, job: str, attempts: int) -> None:
        """Takes as long as there is no room: an accepted job is not lost for a full disk."""
        sql = "UPDATE jobs SET state='running', started=?, attempts=? WHERE caller=? AND id=?"
        statement = (sql, (time.time(), attempts, caller, job))
        change = _Change((statement,), trio.Event(), insists=True)
        try:
            await self._write(change)
        except trio.Cancelled:  # it will not be started: the next daemon may, if nobody says more
            if change in self._overdue:
                self._overdue.remove(change)
            raise

    async def close(self, row: Row, size: int, *, insist: bool) -> None:
        """The end of a job that was accepted."""
        sql = (
            "UPDATE jobs SET state='done', request=NULL, started=?, ended=?, attempts=?,"
            " status=?, result=?, events=?, size=? WHERE caller=? AND id=?"
        )
        await self.write((sql, (*_end(row, size), row.caller, row.id)), insist=insist)

    async def enter(self, row: Row, size: int) -> None:
        """The end of a job that is not known here yet: it is only noted."""
        await self.note(
            "INSERT INTO jobs(caller, id, state, about, created, started, ended, attempts, status,"
            " result, events, size) VALUES(?,?,'done',?,?,?,?,?,?,?,?,?)",
            row.caller,
            row.id,
            row.about,
            row.created,
            *_end(row, size),
        )

    async def flush(self) -> None:
        """Everything noted up to now is on disk, or cannot get there."""
        await self.write()

    async def _write_all(self) -> None:
        while True:
            with trio.move_on_at(self._again):
                await self._more.wait()
                with trio.move_on_after(PAUSE):
                    await self._urgent.wait()
            if trio.current_time() >= self._again:
                self._waiting[:0], self._overdue, self._again = self._overdue, [], math.inf
            batch, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
            if not self._waiting:
                self._more, self._urgent = trio.Event(), trio.Event()
            self._committing = True
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._commit, batch, limiter=self._using)
            self._committing = False
            self._tell(batch)

    def _tell(self, batch: list[_Change]) -> None:
        """Who waits hears of it; what must be written is kept for another try."""
        self._note_trouble([change for change in batch if change.error is not None])
        for change in batch:
            if change.error is not None and change.insists:
                change.error = None
                self._overdue.append(change)
                self._again = trio.current_time() + AGAIN
            elif change.written is not None:
                change.written.set()

    def _note_trouble(self, failed: list[_Change]) -> None:
        """In the log, once: nobody else hears why notes are not there, or jobs do not go on."""
        unheard = [change for change in failed if change.insists or change.written is None]
        if unheard and not self._troubled:
            why = f"{unheard[0].error}: is there room on its disk?"
            logger.error("the journal cannot be written", extra={"why": why})
        if self._troubled and not failed:
            logger.warning("the journal is written again")
        self._troubled = bool(unheard) or (self._troubled and bool(failed))

    def _commit(self, batch: list[_Change]) -> None:
        """All of them at once; where that fails each alone, so that one takes no other with it."""
        try:
            self._apply(batch)
        except sqlite3.Error:
            for change in batch:
                try:
                    self._apply([change])
                except sqlite3.Error as error:
                    change.error = error

    def _apply(self, batch: list[_Change]) -> None:
        statements = [one for change in batch for one in change.statements]
        if not statements:  # of who only wants to be sure that all before is written
            return
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for sql, same in itertools.groupby(statements, lambda one: one[0]):
                self._execute(sql, [values for _, values in same])
            self._database.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise

    def _execute(self, sql: str, rows: list[tuple[Any, ...]]) -> None:
        """Several rows by one statement where it can be: each one gives the interpreter up and has
        to get it back from a thread that is busy with other things."""
        whole = 0
        head, values, places = sql.partition("VALUES")
        if values and len(rows) >= TOGETHER:
            whole = len(rows) - len(rows) % TOGETHER
            several = head + values + ",".join([places] * TOGETHER)
            for first in range(0, whole, TOGETHER):
                together = itertools.chain.from_iterable(rows[first : first + TOGETHER])
                self._database.execute(several, tuple(together))
        self._database.executemany(sql, rows[whole:])

    # -- reading

    async def select(self, sql: str, *values: Any) -> list[Any]:
        """What was written or noted before is seen. HostError if it cannot be read."""
        if self._waiting or self._committing:
            await self.flush()

        def look() -> list[Any]:
            try:
                return self._database.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise _failed("read", error) from error

        return await trio.to_thread.run_sync(look, limiter=self._using)

    async def find(self, caller: str, job: str, *, whole: bool = True) -> Row | None:
        """Only a `whole` one has its request and its result, which may be large."""
        sql = f"SELECT {_COLUMNS if whole else _EVENTS} FROM jobs WHERE caller=? AND id=?"
        return next((Row(*one) for one in await self.select(sql, caller, job)), None)

    async def find_key(self, caller: str, key: str) -> Row | None:
        sql = f"SELECT {_BRIEF} FROM jobs WHERE caller=? AND key=?"
        return next((Row(*one) for one in await self.select(sql, caller, key)), None)

    async def find_batch(self, caller: str, batch: str) -> BatchRow | None:
        found = await self.select(f"{_BATCH}id=?", caller, batch)
        return next((BatchRow(*one) for one in found), None)

    async def find_batch_key(self, caller: str, key: str) -> BatchRow | None:
        found = await self.select(f"{_BATCH}key=?", caller, key)
        return next((BatchRow(*one) for one in found), None)

    async def statuses(self, batch: BatchRow) -> dict[str, tuple[State, str | None]]:
        """State and status of those of its jobs that are here."""
        found = await self.select(
            "SELECT id, state, status FROM jobs WHERE caller=? AND id>=? AND id<?",
            batch.caller,
            f"{batch.id}.",
            f"{batch.id}/",  # the next character
        )
        names = set(batch.names)
        return {job: (state, status) for job, state, status in found if job in names}

    async def unfinished(self) -> AsyncGenerator[Row, None]:
        """What a daemon that is gone left, oldest first; one at a time, for they may be large."""
        which = "SELECT number FROM jobs WHERE state IN ('queued', 'running') ORDER BY number"
        for (number,) in await self.select(which):
            sql = f"SELECT {_COLUMNS} FROM jobs WHERE number=?"
            for one in await self.select(sql, number):
                yield Row(*one)

    async def page(
        self, caller: str, state: str | None, before: int | None, most: int
    ) -> list[Row]:
        """The newest first."""
        sql = (
            f"SELECT {_BRIEF} FROM jobs WHERE caller=? AND (? IS NULL OR state=?)"
            " AND (? IS NULL OR number<?) ORDER BY number DESC LIMIT ?"
        )
        rows = await self.select(sql, caller, state, state, before, before, most)
        return [Row(*one) for one in rows]

    # -- getting rid of what is old

    async def expired(self, age: float, most: int) -> list[Expired]:
        """Results older than `age` seconds, and the oldest above `most` bytes in all; not all of
        them at once."""
        doomed = await self.select(
            "SELECT number, caller, id FROM (SELECT number, caller, id, ended,"
            " SUM(size) OVER (ORDER BY ended DESC, number DESC) AS so_far FROM jobs"
            " WHERE state='done') WHERE ended < ? OR so_far > ? LIMIT ?",
            time.time() - age,
            most,
            MOST_AT_ONCE,
        )
        return [Expired(*one) for one in doomed]

    async def forget(self, doomed: Iterable[Expired]) -> None:
        """HostError if that cannot be written: then they are all there still."""
        await self.write(*(("DELETE FROM jobs WHERE number=?", (one.number,)) for one in doomed))
        await self.select("PRAGMA incremental_vacuum")

    async def forget_batches(self, age: float) -> None:
        """Those older than `age` seconds of whose jobs none is left."""
        await self.write((_FORGET_BATCHES, (time.time() - age,)))


def _end(row: Row, size: int) -> tuple[Any, ...]:
    return (row.started, row.ended, row.attempts, row.status, row.result, row.events, size)


def _failed(what: str, error: sqlite3.Error) -> HostError:
    return HostError(
        "journal", f"the journal cannot be {what}: {error}", hint="is there room on its disk?"
    )


@asynccontextmanager
async def open_journal(folder: Path) -> AsyncIterator[Journal]:
    """The journal in this directory, which no other daemon may have open: HostError."""
    with _locked(folder), contextlib.closing(_connect(folder / "journal.sqlite")) as database:
        journal = Journal(database)
        async with trio.open_nursery() as nursery:
            writing = trio.CancelScope(shield=True)

            async def write() -> None:
                with writing:
                    await journal._write_all()

            nursery.start_soon(write)
            try:
                yield journal
            finally:
                with trio.CancelScope(shield=True):
                    journal._waiting += journal._overdue
                    await journal.flush()
                writing.cancel()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            "state", f"{folder}: {error.strerror}", hint="name another: --state DIR"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HostError(
                "state",
                f"{folder}: another daemon has it",
                hint="stop that one, or name another: --state DIR",
            ) from None
        yield
    finally:
        os.close(lock)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            database.executescript(_SCHEMA)
        elif version != VERSION:
            database.close()
            raise HostError(
                "state",
                f"{path}: of another version ({version}) of sandboxd",
                hint="name another directory: --state DIR",
            )
        database.executescript(_BATCHES)
        database.execute("PRAGMA cache_size=-256")  # KiB; what lies on disk the kernel caches
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("PRAGMA journal_size_limit=67108864")
    except (OSError, sqlite3.Error) as error:
        raise HostError("state", f"{path}: {error}", hint="name another: --state DIR") from None
    return database
