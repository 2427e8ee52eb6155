"""Files that callers of go-judge's protocol put here or had kept, by ids of ours.

They are working material and no results: a daemon that starts finds none, and nothing is made sure
to be on disk. Each caller sees its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import trio

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

    def open(self) -> None:
        """In a thread: forget what an earlier daemon had."""
        shutil.rmtree(self._top, ignore_errors=True)
        self._top.mkdir(parents=True, mode=0o700)

    def new_folder(self) -> Path:
        """A name for a directory of what one request leaves; who makes it removes it."""
        return self._top / f"run-{secrets.token_hex(8)}"

    def save(self, caller: str, name: str, data: bytes) -> str:
        """In a thread: keep these bytes; Refusal 413 if the caller has too much. Its id."""
        self._check_room(caller, len(data))
        key = secrets.token_hex(8)
        path = self._top / key
        path.write_bytes(data)
        return self._keep(caller, key, name, len(data))

    def link(self, caller: str, name: str, source: Path) -> str:
        """In a thread: keep this file, which nobody writes to any more."""
        size = source.stat().st_size
        self._check_room(caller, size)
        key = secrets.token_hex(8)
        os.link(source, self._top / key)
        return self._keep(caller, key, name, size)

    def _check_room(self, caller: str, size: int) -> None:
        if self._sizes[caller] + size > self._most:
            raise Refusal(
                413,
                "quota",
                f"more than the {self._most} bytes that a caller may store",
                hint="delete files, or ask for a larger --quota-stored",
            )

    def _keep(self, caller: str, key: str, name: str, size: int) -> str:
        self._files[caller, key] = Stored(name, self._top / key, size, time.monotonic())
        self._sizes[caller] += size
        return key

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
        self._sizes[caller] -= found.size
        with contextlib.suppress(FileNotFoundError):
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

    def total(self) -> int:
        return sum(self._sizes.values())
