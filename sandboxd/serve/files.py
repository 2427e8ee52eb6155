"""Files that callers put here and jobs left behind, by the SHA-256 of their content.

Each caller has a directory of its own: knowing a digest lets nobody at another's file, or find out
that it exists. A file that is older than the age, and that no waiting job names, is removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator
from pathlib import Path
from typing import IO

import trio

from sandboxd.errors import HostError
from sandboxd.serve.callers import Caller
from sandboxd.serve.wire import Refusal

PIECE = 256 << 10
PARTIAL = "tmp"


class Files:
    """The store, in a directory that only the daemon writes to."""

    def __init__(self, top: Path, most: int) -> None:
        self._top = top
        self._most = most
        self._stored: dict[str, int] = {}
        self._pinned: Counter[tuple[str, str]] = Counter()
        self._coming: Counter[str] = Counter()
        """Caller -> bytes that are on their way."""
        self._counting = threading.RLock()

    def open(self) -> None:
        """Make it, forget what was half-written, and count what is there."""
        self._top.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = self._top / PARTIAL
        partial.mkdir(exist_ok=True, mode=0o700)
        for left in partial.iterdir():
            left.unlink()
        for folder in self._top.iterdir():
            if folder.name != PARTIAL:
                self._stored[folder.name] = sum(one.stat().st_size for one in folder.iterdir())

    def stored(self, caller: str) -> int:
        """Bytes that a caller has here."""
        return self._stored.get(_folder(caller), 0)

    def total(self) -> int:
        return sum(self._stored.values())

    def path(self, caller: str, digest: str) -> Path:
        """Where it is; Refusal 404 if it is not there."""
        found = self._top / _folder(caller) / digest
        if not found.is_file():
            raise Refusal(404, "file", f"no file {digest}", hint=f"PUT /v1/files/{digest}")
        return found

    def pinned(
        self, caller: str, digests: Collection[str]
    ) -> contextlib.AbstractContextManager[None]:
        """They stay meanwhile, however old they are; Refusal 404 if one is not there."""
        return self._pinning(caller, digests) if digests else contextlib.nullcontext()

    @contextlib.contextmanager
    def _pinning(self, caller: str, digests: Collection[str]) -> Iterator[None]:
        keys = [(caller, digest) for digest in digests]
        with self._counting:  # what is being removed at this moment is there, or is not
            for key in keys:
                os.utime(self.path(*key))
            self._pinned.update(keys)
        try:
            yield
        finally:
            self._pinned.subtract(keys)
            for key in keys:
                if self._pinned[key] <= 0:
                    del self._pinned[key]

    async def put(self, caller: Caller, digest: str, pieces: AsyncIterator[bytes]) -> int:
        """Take a file; Refusal if it is not what its digest says, or one too many, HostError if it
        cannot be written. Its size."""
        found, size, coming = hashlib.sha256(), 0, 0
        try:
            with self._partial() as (file, name):
                buffer = bytearray()
                async for piece in pieces:
                    self._reserve(caller.name, len(piece))
                    coming = size = size + len(piece)
                    found.update(piece)
                    buffer += piece
                    if len(buffer) >= PIECE:
                        await trio.to_thread.run_sync(file.write, bytes(buffer))
                        buffer.clear()
                file.write(buffer)
                await trio.to_thread.run_sync(_to_disk, file)
                if found.hexdigest() != digest:
                    raise Refusal(422, "file", f"its SHA-256 is {found.hexdigest()}")
                self._keep(caller.name, digest, name, size)
                coming = 0
        finally:
            self._give_back(caller.name, coming)
        return size

    def save(self, caller: str, digest: str, data: bytes) -> None:
        """In a thread: keep what a job left; Refusal if it is one too many, HostError if it cannot
        be written."""
        target = self._top / _folder(caller) / digest
        with self._counting, contextlib.suppress(FileNotFoundError):
            os.utime(target)
            return
        self._reserve(caller, len(data))
        coming = len(data)
        try:
            with self._partial() as (file, name):
                file.write(data)
                _to_disk(file)
                self._keep(caller, digest, name, len(data))
                coming = 0
        finally:
            self._give_back(caller, coming)

    @contextlib.contextmanager
    def _partial(self) -> Iterator[tuple[IO[bytes], Path]]:
        """A file that is gone afterwards, unless it got a name of its own."""
        try:
            handle, name = tempfile.mkstemp(dir=self._top / PARTIAL)
            try:
                with os.fdopen(handle, "wb") as file:
                    yield file, Path(name)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
        except OSError as error:
            why = error.strerror or str(error)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "make room on the daemon's disk" if full else "the daemon's log may say more"
            raise HostError("files", f"a file cannot be kept: {why}", hint=hint) from error

    def _reserve(self, caller: str, size: int) -> None:
        """Room for so many bytes that are on their way; Refusal if there is none."""
        with self._counting:
            if self.stored(caller) + self._coming[caller] + size > self._most:
                raise Refusal(
                    413,
                    "quota",
                    f"more than the {self._most} bytes that a caller may store",
                    hint="files go when they are old; or ask for a larger --quota-stored",
                )
            self._coming[caller] += size

    def _give_back(self, caller: str, size: int) -> None:
        with self._counting:
            self._coming[caller] -= size
            if not self._coming[caller]:
                del self._coming[caller]

    def _keep(self, caller: str, digest: str, partial: Path, size: int) -> None:
        """It is there, and on its way no more."""
        folder = self._top / _folder(caller)
        folder.mkdir(exist_ok=True, mode=0o700)
        target = folder / digest
        with self._counting:
            new = not target.exists()
            os.replace(partial, target)
            if new:
                self._stored[folder.name] = self._stored.get(folder.name, 0) + size
            self._give_back(caller, size)

    def expire(self, age: float) -> int:
        """In a thread: remove what is older than `age` seconds and not needed. How many."""
        gone, oldest = 0, time.time() - age
        pinned = {(_folder(caller), digest) for caller, digest in list(self._pinned)}
        for folder in self._top.iterdir():
            for file in folder.iterdir() if folder.name != PARTIAL else ():
                if (folder.name, file.name) not in pinned and self._expired(file, oldest):
                    gone += 1
        return gone

    def _expired(self, file: Path, oldest: float) -> bool:
        """Whether it was removed. Who asks for a file makes it new, so none that is asked for at
        this moment goes."""
        gone = self._top / PARTIAL / f"{file.parent.name}-{file.name}"
        with self._counting:
            found = file.stat()
            if found.st_mtime >= oldest:
                return False
            os.replace(file, gone)
            left = self._stored.get(file.parent.name, 0) - found.st_size
            self._stored[file.parent.name] = max(0, left)
        gone.unlink()  # takes long where it is large
        return True


def _folder(caller: str) -> str:
    """A name for a directory that no caller can choose."""
    return hashlib.sha256(caller.encode()).hexdigest()[:32]


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


async def pieces_of(path: Path) -> AsyncGenerator[bytes, None]:
    """The content of a file, piece by piece."""
    with await trio.to_thread.run_sync(path.open, "rb") as file:
        while data := await trio.to_thread.run_sync(file.read, PIECE):
            yield data
