"""A submission: a stranger's source files, read without following anything they point to."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MOST_FILES = 1000
MOST_DEPTH = 16
LONGEST_NAME = 1024
LONGEST_NAMES = 64 << 10
"""Bytes of all names together: each may become an argument of the compiler."""


class SourceError(Exception):
    """The submission cannot be compiled as it stands: the verdict is CE, with this reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """`files`: relative name -> content. `language` is a code of languages.toml, if it is known."""

    name: str
    files: Mapping[str, bytes]
    language: str | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.files.values()))


def check_names(files: Mapping[str, bytes]) -> None:
    """SourceError unless every name is one that a directory could hold, and a compiler be told."""
    folders: set[str] = set()
    length = 0
    for name in files:
        parts = name.split("/")
        try:
            encoded = os.fsencode(name)
        except UnicodeEncodeError:
            raise SourceError(f"{name!r} cannot be a file name") from None
        length += len(encoded) + 1
        if b"\0" in encoded or len(encoded) > LONGEST_NAME or {"", ".", ".."} & {*parts}:
            raise SourceError(f"{name[:100]!r} cannot be a file name")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    if both := folders & files.keys():
        raise SourceError(f"{min(both)[:100]!r} is both a file and a directory")
    if len(files) > MOST_FILES or length > LONGEST_NAMES:
        raise SourceError("too many files, or their names are too long")


def load(path: Path, limit: int, language: str | None = None) -> Submission:
    """The file or directory at `path`; SourceError if it is more than `limit` bytes of files.

    `path` itself may be a link (whoever names it means it). What a directory holds belongs to the
    stranger: links, pipes and devices in it are refused, so that no file of this machine's ends up
    in a sandbox by name.
    """
    reader = _Reader(limit)
    if path.is_dir():
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            reader.read_folder(folder, "", 0)
        finally:
            os.close(folder)
    else:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            reader.read_file(file, path.name)
        finally:
            os.close(file)
    return Submission(name=path.name, files=reader.files, language=language)


class _Reader:
    """Collects files until the budget is used up."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = limit
        self.files: dict[str, bytes] = {}

    def read_folder(self, folder: int, prefix: str, depth: int) -> None:
        if depth > MOST_DEPTH:
            raise SourceError(f"{prefix}: directories are nested more than {MOST_DEPTH} deep")
        for name in sorted(os.listdir(folder)):
            if name.startswith("."):
                continue  # the format: as if it were not there
            kind = stat.S_IFMT(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFDIR):
                raise SourceError(f"{prefix}{name}: only ordinary files and directories are taken")
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            opened = os.open(name, flags, dir_fd=folder)
            try:
                if kind == stat.S_IFDIR:
                    self.read_folder(opened, f"{prefix}{name}/", depth + 1)
                else:
                    self.read_file(opened, prefix + name)
            finally:
                os.close(opened)

    def read_file(self, file: int, name: str) -> None:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise SourceError(f"{name}: not an ordinary file")
        if len(self.files) >= MOST_FILES:
            raise SourceError(f"more than {MOST_FILES} files")
        parts: list[bytes] = []
        while part := os.read(file, min(1 << 20, self.left + 1)):
            parts.append(part)
            self.left -= len(part)
            if self.left < 0:
                raise SourceError(f"the sources are larger than {self.limit} bytes")
        self.files[name] = b"".join(parts)
