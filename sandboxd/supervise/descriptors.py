"""Owning descriptors: closed in reverse, in every ending."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self


class Descriptors:
    """A group of descriptors with one owner: `with Descriptors() as fds: fd = fds.own(...)`."""

    def __init__(self) -> None:
        self._owned: list[int] = []

    def own(self, fd: int) -> int:
        self._owned.append(fd)
        return fd

    def close(self, fd: int) -> None:
        """Close one early; nothing happens if it is closed already."""
        if fd in self._owned:
            self._owned.remove(fd)
            os.close(fd)

    def close_all(self) -> None:
        while self._owned:
            os.close(self._owned.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close_all()
