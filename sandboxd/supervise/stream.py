"""A job's output: every byte counted and hashed, the first and the last ones kept, all passed on.

Reading is what lets the job go on. A slow reader of the events therefore stalls the job, through
its full pipe, and never our memory; a reader that went away ends it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from sandboxd.result import Output

CHUNK = 65536
EMPTY = hashlib.sha256()
Forward = Callable[[str, bytes], Awaitable[None]]


class Capture:
    """What is kept of one stream: a head and a tail of `keep` bytes together."""

    def __init__(self, keep: int) -> None:
        self.count = 0
        self._half = keep - keep // 2
        self._tail_size = keep // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._hash = EMPTY.copy()

    def add(self, data: bytes) -> None:
        self.count += len(data)
        self._hash.update(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data
            if len(self._tail) > 2 * self._tail_size + CHUNK:
                del self._tail[: -self._tail_size or len(self._tail)]

    def output(self) -> Output:
        if not self.count:
            return NOTHING
        tail = bytes(self._tail[-self._tail_size :]) if self._tail_size else b""
        kept = len(self._head) + len(tail)
        truncated = kept < self.count
        head = bytes(self._head)
        return Output(
            bytes=self.count,
            kept=kept,
            truncated=truncated,
            sha256=self._hash.hexdigest(),
            data=head if truncated else head + tail,
            tail=tail if truncated else b"",
        )


NOTHING = Output(bytes=0, kept=0, truncated=False, sha256=EMPTY.hexdigest(), data=b"")


class Budget:
    """Bytes that all streams of a run may still produce; None is no limit."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.used = 0

    def spend(self, count: int) -> bool:
        """Whether the limit still holds after these."""
        self.used += count
        return self.limit is None or self.used <= self.limit


async def feed(source: int, target: int, close: Callable[[int], None]) -> None:
    """Write a file to a nonblocking descriptor, then close that; a reader that is gone ends it."""
    try:
        while data := memoryview(os.read(source, CHUNK)):
            while data:
                try:
                    data = data[os.write(target, data) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(target)
    except BrokenPipeError:
        pass
    finally:
        close(target)


class Pump:
    """Reads one nonblocking descriptor into its capture."""

    def __init__(
        self, name: str, fd: int, capture: Capture, budget: Budget, exceeded: Callable[[], None]
    ) -> None:
        self.fd = fd
        self.name = name
        self.over = False
        self._capture = capture
        self._budget = budget
        self._exceeded = exceeded
        self._stopped = False

    def read(self) -> bytes:
        """Take what is there, once; BlockingIOError if that is nothing. Sets `over` at the end."""
        try:
            data = os.read(self.fd, CHUNK)
        except BlockingIOError:
            raise
        except OSError:  # EIO: the other side of a terminal is gone
            data = b""
        if not data:
            self.over = True
            return b""
        if self._stopped:  # only to let the rest die; what it still says is not the job's output
            return b""
        budget = self._budget
        if not budget.spend(len(data)):
            self._stopped = True
            over = budget.used - (budget.limit or 0)
            data = data[: max(0, len(data) - over)]
            self._exceeded()
        self._capture.add(data)
        return data

    def look(self) -> bytes:
        """The same, if there is something."""
        if self.over:
            return b""
        try:
            return self.read()
        except BlockingIOError:
            return b""

    def drain(self) -> list[bytes]:
        """Take the rest, which a pipe or a terminal holds; for when nobody can write any more."""
        rest = []
        with suppress(BlockingIOError):
            while not self.over:
                if data := self.read():
                    rest.append(data)
        return rest


async def nowhere(name: str, data: bytes) -> None:
    """Where the output of a run goes that nobody follows."""
    await trio.lowlevel.checkpoint()


async def forward(pump: Pump, to: Forward, begin: bytes = b"") -> None:
    """Read to the end, and pass everything on: `begin`, which was read before, first."""
    if begin:
        await to(pump.name, begin)
    while not pump.over:
        try:
            data = pump.read()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(pump.fd)
            continue
        if data:
            await to(pump.name, data)
