"""The events of one job: kept within bounds, read from any number on, by any number of readers.

Theory of operation. Lines are gathered in memory. When there are CHUNK bytes of them they are
sealed: a job that may spill appends them to a file of its own and keeps their place; one that may
not keeps them in memory. Sealed chunks beyond the bound are given up, oldest first, but never one
that an attached reader has still to read: then whoever appends waits, which stalls the job and
nothing else. With `stall` what nobody has read yet is not given up either. What was read stays as
long as there is room, for a reader whose connection broke. A job that was killed has little left to
say, and no longer waits for anybody (`hurry`).
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from sandboxd.serve.wire import place

CHUNK = 64 << 10
MEMORY = 256 << 10
"""Bytes of events of a job that does not spill."""
SEGMENTS = 8
"""Files that a spilled log has, at most and one more."""
LAST_WORDS = 4 << 20
"""Bytes above the bound that a job in a hurry may still add before readers lose the oldest."""
BLOCK = 64 << 10
AGAIN = 1.0
"""Seconds after which what could not be written is tried again."""
QUIET = 15.0
"""Seconds after which a reader learns that nothing has happened."""


logger = logging.getLogger("sandboxd.serve")


class TooOld(Exception):
    """The event asked for is kept no more; `first` is the oldest that is."""

    def __init__(self, first: int) -> None:
        super().__init__(f"events before {first} are gone")
        self.first = first


@dataclass(slots=True)
class _Chunk:
    first: int
    last: int
    size: int
    lines: list[bytes] | None
    """None: they are in the file."""
    segment: int = 0
    offset: int = 0


class Reader:
    """A place in a log."""

    def __init__(self, following: int) -> None:
        self.following = following


class Log:
    """A job's events while it lives. `folder` is made when there is something to spill."""

    def __init__(self, folder: Path | None, most: int, *, stall: bool) -> None:
        self.folder = folder
        self._most = most if folder is not None else min(most, MEMORY)
        self._stall = stall
        self._sealed: deque[_Chunk] = deque()
        self._open: list[bytes] = []
        self._open_size = 0
        self._first_open = 0
        self._size = 0
        self._lost = False
        self._read_up_to = -1
        self._hurried = False
        self._readers: set[Reader] = set()
        self.last = -1
        self.over = False
        self.heard: Callable[[], None] | None = None
        """Called when there is something to read, for who reads several logs."""

    @functools.cached_property
    def _changed(self) -> trio.Event:
        """There is something to read."""
        return trio.Event()

    @functools.cached_property
    def _room(self) -> trio.Event:
        """Something was read."""
        return trio.Event()

    # -- the job's side

    async def append(self, seq: int, line: bytes) -> None:
        """Waits while there is no room; never once `finish` was called."""
        if not self.put(seq, line):
            await self.make_room()

    def put(self, seq: int, line: bytes) -> bool:
        """Whether there is room for the next one, too: else make_room() must come before that."""
        if not self._open:
            self._first_open = seq
        self._open.append(line)
        self._open_size += len(line) + 1
        self.last = seq
        self._wake()
        return self._open_size < CHUNK

    async def make_room(self) -> None:
        """Waits while there is none; also on a disk that is full."""
        self._seal()
        await self._write(patiently=False)
        while self._size > self._most and self._sealed and not self._give_up_oldest():
            if self._hurried:
                break
            await self._room.wait()

    def hurry(self) -> None:
        """From now on nobody is waited for: the job has been killed."""
        self._hurried = True
        self._make_room()

    async def settle(self) -> None:
        """What the job said is complete; if some of it is in files, all of it shall be."""
        if self.folder is not None and self._sealed:
            if self._open:
                self._seal()
            await self._write(patiently=True)

    def finish(self, seq: int, line: bytes) -> None:
        """The last event; it always has room."""
        if not self._open:
            self._first_open = seq
        self._open.append(line)
        self.last = seq
        self.over = True
        self._wake()

    def _wake(self) -> None:
        if self._readers:
            self._changed.set()
            self._changed = trio.Event()
            if self.heard is not None:
                self.heard()

    def _seal(self) -> None:
        self._sealed.append(_Chunk(self._first_open, self.last, self._open_size, self._open))
        self._size += self._open_size
        self._open, self._open_size = [], 0

    async def _write(self, *, patiently: bool) -> None:
        """What is sealed, to files. Where that cannot be it is tried again, but not in a hurry,
        unless `patiently`."""
        failed = False
        while self.folder is not None:
            try:
                await trio.to_thread.run_sync(self._spill)
                return
            except OSError as error:
                if not failed:
                    logger.error("events cannot be written", extra={"why": str(error)})
                failed = True
            if self._hurried and not patiently:
                return
            await trio.sleep(AGAIN)

    def _spill(self) -> None:
        """In a thread: a disk that is slow must hold up nobody else."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        before = None
        for chunk in list(self._sealed):
            if chunk.lines is not None:
                self._append(chunk, chunk.lines, before)
            before = chunk

    def _append(self, chunk: _Chunk, lines: list[bytes], before: _Chunk | None) -> None:
        assert self.folder is not None
        segment = before.segment if before else 0
        offset = before.offset + before.size if before else 0
        if offset >= self._most // SEGMENTS:
            segment, offset = segment + 1, 0
        with open(self.folder / f"{segment:08}", "ab") as file:
            file.truncate(offset)  # half of a piece may be there
            file.write(b"".join(line + b"\n" for line in lines))
        chunk.segment, chunk.offset, chunk.lines = segment, offset, None

    def _give_up_oldest(self) -> bool:
        """Whether the oldest chunk was given up; a file goes when all of it is."""
        oldest = self._sealed[0]
        wanted = any(reader.following <= oldest.last for reader in self._readers)
        unread = self._stall and self._read_up_to < oldest.last
        if (wanted or unread) and not (self._hurried and self._size > self._most + LAST_WORDS):
            return False
        self._sealed.popleft()
        self._size -= oldest.size
        self._lost = True
        still = self._sealed and self._sealed[0].segment == oldest.segment
        if self.folder is not None and oldest.lines is None and not still:
            with suppress(FileNotFoundError):
                os.unlink(self.folder / f"{oldest.segment:08}")
        return True

    # -- the readers' side

    @property
    def first(self) -> int:
        """The oldest event that is kept."""
        return self._sealed[0].first if self._sealed else self._first_open

    @property
    def spilled(self) -> bool:
        return any(chunk.lines is None for chunk in self._sealed)

    def lines(self) -> list[bytes] | None:
        """What is kept, if all of that is in memory."""
        if self.spilled:
            return None
        sealed = [line for chunk in self._sealed for line in chunk.lines or ()]
        return sealed + self._open

    @contextmanager
    def reading(self, following: int | None) -> Iterator[Reader]:
        """A reader from this event on, or of all that are kept; TooOld if it is kept no more."""
        if following is None:
            following = self.first if self._lost else 0
        if self._lost and following < self.first:
            raise TooOld(self.first)
        reader = Reader(following)
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            self._make_room()

    async def read(
        self, reader: Reader, *, follow: bool = True
    ) -> AsyncGenerator[list[bytes], None]:
        """Pieces of the log, up to its end, or to what is there now."""
        while True:
            changed = self._changed
            if lines := await self.some(reader):
                yield lines
                self.passed(reader, lines)
            elif not follow or (self.over and reader.following > self.last):
                return
            else:
                with trio.move_on_after(QUIET) as quiet:
                    await changed.wait()
                if quiet.cancelled_caught:
                    yield []

    async def some(self, reader: Reader) -> list[bytes]:
        """What comes next for a reader; nothing if there is nothing yet."""
        if self._lost and reader.following < self.first:
            raise TooOld(self.first)
        return await self._piece(reader.following)

    def passed(self, reader: Reader, lines: list[bytes]) -> None:
        """The reader has taken these, and their room may be used."""
        reader.following = place(lines[-1])[0] + 1
        self._read_up_to = max(self._read_up_to, reader.following - 1)
        self._make_room()

    def _make_room(self) -> None:
        self._room.set()
        self._room = trio.Event()

    async def _piece(self, following: int) -> list[bytes]:
        chunk = next((one for one in self._sealed if one.last >= following), None)
        if chunk is None:
            lines = self._open
        elif chunk.lines is not None:
            lines = chunk.lines
        else:
            lines = await trio.to_thread.run_sync(self._load, chunk)
        return [line for line in lines if place(line)[0] >= following]

    def _load(self, chunk: _Chunk) -> list[bytes]:
        assert self.folder is not None
        try:
            with open(self.folder / f"{chunk.segment:08}", "rb") as file:
                return os.pread(file.fileno(), chunk.size, chunk.offset).splitlines()
        except FileNotFoundError:  # it is over, and was kept long enough
            raise TooOld(chunk.last + 1) from None


async def read_finished(folder: Path) -> AsyncGenerator[list[bytes], None]:
    """What a job that is over left in its files."""
    for file in await trio.to_thread.run_sync(_segments, folder):
        rest = b""
        offset = 0
        while data := await trio.to_thread.run_sync(_block, file, offset):
            offset += len(data)
            *whole, rest = (rest + data).split(b"\n")
            if whole:
                yield whole


def first_of_finished(folder: Path) -> int | None:
    """The oldest event in the files; None if there are none."""
    for file in _segments(folder):
        with suppress(ValueError):
            return place(_block(file, 0).partition(b"\n")[0])[0]
    return None


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _block(file: Path, offset: int) -> bytes:
    try:
        with file.open("rb") as opened:
            return os.pread(opened.fileno(), BLOCK, offset)
    except FileNotFoundError:  # it got too old meanwhile
        return b""


def remove(folder: Path) -> None:
    """In a thread: a log, if there is one."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
