"""Files that callers put here and jobs left behind, by the SHA-256 of their content.

Each caller has a directory of its own: knowing a digest lets nobody at another's file, or find out
that it exists. A file that is older than the age, and that no waiting job names, is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator
from pathlib import Path

import trio

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
        self._counting = threading.Lock()

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
        """Take a file; Refusal if it is not what its digest says, or one too many. Its size."""
        handle, name = tempfile.mkstemp(dir=self._top / PARTIAL)
        found, size = hashlib.sha256(), 0
        try:
            with os.fdopen(handle, "wb") as file:
                buffer = bytearray()
                async for piece in pieces:
                    size += len(piece)
                    self._coming[caller.name] += len(piece)
                    self._check_room(caller.name)
                    found.update(piece)
                    buffer += piece
                    if len(buffer) >= PIECE:
                        await trio.to_thread.run_sync(file.write, bytes(buffer))
                        buffer.clear()
                file.write(buffer)
                await trio.to_thread.run_sync(_to_disk, file.flush, file.fileno())
            if found.hexdigest() != digest:
                raise Refusal(422, "file", f"its SHA-256 is {found.hexdigest()}")
            self._keep(caller.name, digest, Path(name), size)
        finally:
            self._coming[caller.name] -= size
            if not self._coming[caller.name]:
                del self._coming[caller.name]
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        return size

    def save(self, caller: str, digest: str, data: bytes) -> bool:
        """In a thread: keep what a job left; False if it is one too many."""
        target = self._top / _folder(caller) / digest
        if target.exists():
            os.utime(target)
            return True
        if self.stored(caller) + len(data) > self._most:
            return False
        handle, name = tempfile.mkstemp(dir=self._top / PARTIAL)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            _to_disk(file.flush, file.fileno())
        self._keep(caller, digest, Path(name), len(data))
        return True

    def _check_room(self, caller: str) -> None:
        if self.stored(caller) + self._coming[caller] > self._most:
            raise Refusal(
                413,
                "quota",
                f"more than the {self._most} bytes that a caller may store",
                hint="files go when they are old; or ask for a larger --quota-stored",
            )

    def _keep(self, caller: str, digest: str, partial: Path, size: int) -> None:
        folder = self._top / _folder(caller)
        folder.mkdir(exist_ok=True, mode=0o700)
        target = folder / digest
        with self._counting:
            if not target.exists():
                self._stored[folder.name] = self._stored.get(folder.name, 0) + size
            os.replace(partial, target)

    def expire(self, age: float) -> int:
        """In a thread: remove what is older than `age` seconds and not needed. How many."""
        gone, oldest = 0, time.time() - age
        pinned = {(_folder(caller), digest) for caller, digest in list(self._pinned)}
        for folder in self._top.iterdir():
            for file in folder.iterdir() if folder.name != PARTIAL else ():
                found = file.stat()
                if found.st_mtime < oldest and (folder.name, file.name) not in pinned:
                    with self._counting:
                        file.unlink()
                        left = self._stored.get(folder.name, 0) - found.st_size
                        self._stored[folder.name] = max(0, left)
                    gone += 1
        return gone


def _folder(caller: str) -> str:
    """A name for a directory that no caller can choose."""
    return hashlib.sha256(caller.encode()).hexdigest()[:32]


def _to_disk(flush: object, handle: int) -> None:
    flush()  # type: ignore[operator]
    os.fsync(handle)


async def pieces_of(path: Path) -> AsyncGenerator[bytes, None]:
    """The content of a file, piece by piece."""
    with await trio.to_thread.run_sync(path.open, "rb") as file:
        while data := await trio.to_thread.run_sync(file.read, PIECE):
            yield data
