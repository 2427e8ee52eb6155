"""Files that callers of go-judge's protocol put here or had kept, by ids of ours.

They are working material and no results: a daemon that starts finds none, and nothing is made sure
to be on disk. Each caller sees its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from sandboxd.errors import HostError
from sandboxd.serve.wire import Refusal

EXPIRE_EVERY = 60.0


@dataclass(slots=True)
class Stored:
    """One file: what it was called, where it lies, and when it was last asked for."""

    name: str
    path: Path
    size: int
    used: float


class Store:
    """The files, in a directory of their own. Methods that touch the disk say so."""

    def __init__(self, top: Path, most: int) -> None:
        self._top = top
        self._most = most
        self._files: dict[tuple[str, str], Stored] = {}
        self._sizes: Counter[str] = Counter()
        """Caller -> bytes, those on their way included."""
        self._counting = threading.Lock()

    def open(self) -> None:
        """In a thread: forget what an earlier daemon had."""
        shutil.rmtree(self._top, ignore_errors=True)
        self._top.mkdir(parents=True, mode=0o700)

    def new_folder(self) -> Path:
        """A name for a directory of what one request leaves; who makes it removes it."""
        return self._top / f"run-{secrets.token_hex(8)}"

    def save(self, caller: str, name: str, data: bytes) -> str:
        """In a thread: keep these bytes. Its id; Refusal 413 if the caller has too much, HostError
        if it cannot be written."""
        return self._keep(caller, name, len(data), lambda path: path.write_bytes(data))

    def link(self, caller: str, name: str, source: Path) -> str:
        """In a thread: keep this file, which nobody writes to any more; as `save`."""
        return self._keep(caller, name, source.stat().st_size, functools.partial(os.link, source))

    def _keep(self, caller: str, name: str, size: int, make: Callable[[Path], object]) -> str:
        key = secrets.token_hex(8)
        path = self._top / key
        self._reserve(caller, size)
        try:
            make(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            self._give_back(caller, size)
            why = error.strerror or str(error)
            hint = "is there room on the daemon's disk?"
            raise HostError("files", f"a file cannot be kept: {why}", hint=hint) from error
        self._files[caller, key] = Stored(name, path, size, time.monotonic())
        return key

    def _reserve(self, caller: str, size: int) -> None:
        with self._counting:
            if self._sizes[caller] + size > self._most:
                raise Refusal(
                    413,
                    "quota",
                    f"more than the {self._most} bytes that a caller may store",
                    hint="delete files, or ask for a larger --quota-stored",
                )
            self._sizes[caller] += size

    def _give_back(self, caller: str, size: int) -> None:
        with self._counting:
            self._sizes[caller] -= size
            if not self._sizes[caller]:
                del self._sizes[caller]

    def find(self, caller: str, key: str) -> Stored | None:
        found = self._files.get((caller, key))
        if found is not None:
            found.used = time.monotonic()
        return found

    def names(self, caller: str) -> dict[str, str]:
        """Id -> name, of all that the caller has."""
        every = list(self._files.items())
        return {key: one.name for (owner, key), one in every if owner == caller}

    def remove(self, caller: str, key: str) -> bool:
        """Whether it was there."""
        found = self._files.pop((caller, key), None)
        if found is None:
            return False
        self._give_back(caller, found.size)
        with contextlib.suppress(OSError):  # the next daemon finds none anyway
            found.path.unlink()
        return True

    def expire(self, age: float) -> None:
        """Remove what nobody has asked for in so many seconds."""
        oldest = time.monotonic() - age
        for (caller, key), one in list(self._files.items()):
            if one.used < oldest:
                self.remove(caller, key)

    async def keep_small(self, age: float) -> None:
        """Do so once in a while, for ever."""
        while True:
            await trio.sleep(min(age, EXPIRE_EVERY))
            await trio.to_thread.run_sync(self.expire, age)

    def stored(self, caller: str) -> int:
        """Bytes that a caller has here."""
        return self._sizes.get(caller, 0)

    def total(self) -> int:
        """Of all of them."""
        return sum(self._sizes.values())
