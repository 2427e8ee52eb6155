"""What a caller asks for: one program, its input and the files that go in and come out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from sandboxd.errors import JobError
from sandboxd.policy import Artifacts, Limits, Policy
from sandboxd.reference import Reference

Text = str | bytes | os.PathLike[str] | os.PathLike[bytes]


TEXT = (str, bytes, os.PathLike)


class File(msgspec.Struct, frozen=True, kw_only=True):
    """An input file with permissions of its own; plain bytes get 0o644, a Path keeps its own."""

    data: bytes | Path
    mode: int = 0o644


class Tar(msgspec.Struct, frozen=True):
    """An archive that is unpacked where it is named, as a directory is copied there.

    `source`: the archive itself, its path, or a descriptor to read it from (a pipe, say), which
    stays the caller's. tar, plain or compressed with gzip, bzip2, xz or zstd.
    """

    source: bytes | Path | int


Copied: TypeAlias = bytes | Path | File | Tar
"""What is copied in under a name."""
Input: TypeAlias = Copied | Reference
"""What may be given for a name: copied in, or attached."""
Value = TypeVar("Value")
Names: TypeAlias = Mapping[Any, Value]
"""Keys are str or bytes: a Mapping is invariant in them, so no type would take a dict of either."""


class Pattern(msgspec.Struct, frozen=True):
    """Files to be collected: a name, or one with wildcards, below the working directory.

    `required`: whether it is an error that nothing matches; None: if there is no wildcard in it.
    `literal`: nothing in it is a wildcard.
    """

    name: str | bytes
    required: bool | None = None
    literal: bool = False

    def __post_init__(self) -> None:
        name = os.fsencode(self.name)
        parts = name.split(b"/")
        if name.startswith(b"/") or b"\0" in name or b".." in parts or not {*parts} - {b"", b"."}:
            raise JobError(
                f"collect: {self.name!r} names nothing below the working directory",
                hint="use a relative pattern without ..",
            )


class Terminal(msgspec.Struct, frozen=True, kw_only=True):
    """A terminal for the job instead of pipes (rows and columns of its first size)."""

    rows: int = 24
    columns: int = 80


class Pipe(msgspec.Struct, frozen=True, kw_only=True):
    """Joins two jobs of a pipeline: what `writer` writes to `stream` is the stdin of `reader`.

    Both are numbers of jobs in the pipeline, from 0. The pipe is one of the kernel's, so what goes
    through it is neither seen nor counted. With `relay` it goes through sandboxd, which is slower:
    it is counted and kept in the writer's result, and a writer whose reader has gone is not ended
    by SIGPIPE.

    Of a relayed one, `limit` is the bytes after which the writer is ended (`output_limit`), and
    with `hold` the reader sees no end before Pipeline.pass_end, not even that of a dead writer.
    """

    writer: int
    reader: int
    stream: Literal["stdout", "stderr"] = "stdout"
    relay: bool = False
    limit: int | None = None
    hold: bool = False


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One program to run once.

    Text is bytes to the kernel: str is encoded as os.fsencode does, and nothing is decoded on
    the way. Relative keys of `files` and patterns of `collect` are below the working directory
    of the sandbox (/box). `stdin=None` means that the caller feeds it live through Run.stdin.
    """

    argv: Sequence[Text]
    policy: str | Policy = "base"
    env: Names[str | bytes] = msgspec.field(default_factory=dict)
    cwd: str | bytes | None = None
    stdin: bytes | Path | None = b""
    files: Names[Input] = msgspec.field(default_factory=dict)
    collect: Sequence[str | bytes | Pattern] = ()
    collect_to: Path | Literal["memory", "stream"] = "memory"
    """Where what is collected goes: into the result, below this directory, or to Run.artifacts."""
    artifacts: Artifacts | None = None
    """How much is collected at most."""
    limits: Limits | None = None
    keep: int = 1 << 20
    """Bytes of stdout and of stderr kept in the result (first and last half of it each)."""
    keep_root: bool | str = False
    """Keep what it changes in its writable root, as a layer: under this name, or under its id."""
    terminal: Terminal | None = None
    id: str | None = None
    domain: str | None = None
    """Whose it is: jobs of two domains share no user namespace, and no ids where there are enough;
    those of None are one domain, too."""
    ignored: tuple[tuple[str, str], ...] = ()
    """(What, why) of what was asked for where this job was read from, and is not done: the result
    has them in `degraded`."""

    def __post_init__(self) -> None:
        if isinstance(self.argv, str | bytes):
            raise JobError("argv is one string", hint='give a list: ["python3", "a.py"]')
        if not self.argv:
            raise JobError("argv is empty", hint="name a program to run")
        self._check_types()
        self._check_collect()
        for number, word in enumerate(self.argv):
            if b"\0" in os.fsencode(word):
                raise JobError(f"argv[{number}] contains a NUL byte", hint="no program can get one")
        for key, value in self.env.items():
            name = os.fsencode(key)
            if not name or b"=" in name or b"\0" in name or b"\0" in os.fsencode(value):
                raise JobError(
                    f"env[{os.fsdecode(name)!r}] cannot be set",
                    hint="names are not empty, have no = or NUL",
                )
        if self.cwd is not None and b"\0" in os.fsencode(self.cwd):
            raise JobError("cwd contains a NUL byte")
        for key in self.files:
            check_inside(os.fsencode(key))

    def _check_types(self) -> None:
        """What the type checker would have said, for those who have none."""
        for text in (*self.argv, *self.env, *self.env.values(), *self.files):
            if not isinstance(text, TEXT):
                raise JobError(f"{self._place_of(text)} is {type(text).__name__}",
                               hint="text is str or bytes")  # fmt: skip
        for key, data in self.files.items():
            if not isinstance(data, Input):
                raise JobError(f"files[{key!r}] is {type(data).__name__}",
                               hint="bytes, a Path, a File, a Tar or a Reference")  # fmt: skip
            if isinstance(data, Tar) and not isinstance(data.source, bytes | Path | int):
                raise JobError(f"files[{key!r}] is a Tar of {type(data.source).__name__}",
                               hint="bytes, a Path or a descriptor")  # fmt: skip
        if not isinstance(self.stdin, bytes | Path | None):
            raise JobError(f"stdin is {type(self.stdin).__name__}", hint="bytes, a Path or None")
        if not isinstance(self.policy, str | Policy):
            raise JobError(f"policy is {type(self.policy).__name__}", hint="a name or a Policy")

    def _place_of(self, wrong: object) -> str:
        for number, word in enumerate(self.argv):
            if word is wrong:
                return f"argv[{number}]"
        for key, value in self.env.items():
            if value is wrong:
                return f"env[{key!r}]"
        return f"a name in env or files, {wrong!r}"

    def _check_collect(self) -> None:
        if isinstance(self.collect, str | bytes):
            raise JobError("collect is one string", hint='give a list: ["out/*"]')
        for number, pattern in enumerate(self.collect):
            if not isinstance(pattern, str | bytes | Pattern):
                raise JobError(f"collect[{number}] is {type(pattern).__name__}",
                               hint="a str, bytes or a Pattern")  # fmt: skip
            if not isinstance(pattern, Pattern):
                Pattern(pattern)
        if not isinstance(self.collect_to, Path) and self.collect_to not in ("memory", "stream"):
            raise JobError(f"collect_to is {self.collect_to!r}",
                           hint='a Path, "memory" or "stream"')  # fmt: skip


def check_inside(name: bytes) -> None:
    """Refuses names of input files that would not lie below the working directory."""
    parts = name.split(b"/")
    if not name or name.startswith(b"/") or b"\0" in name or ".." in map(os.fsdecode, parts):
        raise JobError(
            f"files[{os.fsdecode(name)!r}] is not below the working directory",
            hint="use a relative name without ..",
        )
