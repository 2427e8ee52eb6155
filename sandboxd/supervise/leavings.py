"""What a run left, for who reads it afterwards: collected files, opened one after the other.

The descriptor of the working directory keeps its file system alive when the sandbox is dead; a
directory on disk is removed after this, and not with the sandbox. Nobody writes there any more, so
the files are those of the result, whenever they are read.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

import trio

from sandboxd.errors import InternalError, SandboxError
from sandboxd.linux import packets
from sandboxd.linux.packets import DESCRIPTORS
from sandboxd.result import Artifact
from sandboxd.supervise import artifacts

if TYPE_CHECKING:
    from sandboxd.supervise.porter import Porter

Contents = dict[bytes, tuple[bytes, int | None]]


class Source(Protocol):
    """Where collected files are opened again."""

    @property
    def closed(self) -> bool: ...

    async def reopen(self, names: list[bytes]) -> Contents:
        """By name: a small one's content, or a descriptor, which is open until it is let go."""

    def let_go(self, number: int) -> None: ...


class Leavings:
    """Owns the working directory of a run that is over, and the files that are open."""

    def __init__(
        self,
        box: int,
        porter: Callable[[], Awaitable[Porter]],
        remove: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._box = os.dup(box)
        self._porter = porter
        self._remove = remove
        self._open: set[int] = set()

    @property
    def closed(self) -> bool:
        return self._box < 0

    async def reopen(self, names: list[bytes]) -> Contents:
        porter = await self._porter()
        opened = await porter.reopen(self._box, names)
        if self.closed:  # meanwhile, and nobody would close these
            packets.close(number for _, number in opened.values() if number is not None)
            raise left()
        self._open |= {number for _, number in opened.values() if number is not None}
        return {name: (entry.content, number) for name, (entry, number) in opened.items()}

    def let_go(self, number: int) -> None:
        if number in self._open:
            self._open.remove(number)
            os.close(number)

    async def close(self) -> None:
        for number in list(self._open):
            self.let_go(number)
        if self._box >= 0:
            os.close(self._box)
        self._box = -1
        if self._remove is not None:
            with trio.CancelScope(shield=True):
                await self._remove()


def left() -> SandboxError:
    return SandboxError("the run was left", hint="read its artifacts inside the block")


class OpenArtifact:
    """A collected file while it is open, which is until the next one is asked for.

    `async for` gives its content in pieces of at most a MiB; `read` any part of it.
    """

    def __init__(self, record: Artifact, data: bytes, number: int | None) -> None:
        self.record = record
        self._data = data
        self._number = number

    async def read(self, count: int, at: int = 0) -> bytes:
        """`count` bytes from `at` on, fewer only at the end of the file."""
        if self._number is None:
            await trio.lowlevel.checkpoint()
            return self._data[at : at + count]
        if self._number < 0:
            raise SandboxError(f"{self.record.path} is not open any more",
                               hint="read it before the next one is asked for")  # fmt: skip
        return await trio.to_thread.run_sync(artifacts.read, self._number, count, at)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at = 0
        while at < self.record.bytes:
            data = await self.read(artifacts.CHUNK, at)
            if not data:
                raise InternalError(f"{self.record.path} became shorter when nobody was there")
            at += len(data)
            yield data

    def _end(self, leavings: Source) -> None:
        if self._number is not None:
            leavings.let_go(self._number)
            self._number = -1


class OpenArtifacts:
    """The files of a result, one after the other. Made by Run.artifacts()."""

    def __init__(self, records: Callable[[], Awaitable[tuple[Artifact, ...]]]) -> None:
        self._records = records
        self._left: deque[Artifact] | None = None
        self._ready: deque[OpenArtifact] = deque()
        self._last: OpenArtifact | None = None
        self.leavings: Source | None = None

    def __aiter__(self) -> OpenArtifacts:
        return self

    async def __anext__(self) -> OpenArtifact:
        if self._left is None:
            self._left = deque(await self._records())
        if self._last is not None and self.leavings is not None:
            self._last._end(self.leavings)
        if self._ready or self._left:
            self._check_open()
        if not self._ready:
            await self._more(self._left)
        self._last = self._ready.popleft()
        return self._last

    def _check_open(self) -> None:
        if self.leavings is None or self.leavings.closed:
            raise left()

    async def _more(self, left: deque[Artifact]) -> None:
        records = [left.popleft() for _ in range(min(DESCRIPTORS, len(left)))]
        if not records:
            raise StopAsyncIteration
        assert self.leavings is not None
        names = {os.fsencode(record.path): record for record in records}
        opened = await self.leavings.reopen(list(names))
        for name, record in names.items():
            content, number = opened[name]
            self._ready.append(OpenArtifact(record, content, number))
