"""The streams of a job: stdin, stdout and stderr, or a terminal; both ends of each."""

from __future__ import annotations

import os
import stat
import termios
from collections.abc import Mapping
from pathlib import Path

import msgspec

from sandboxd.errors import JobError
from sandboxd.job import Job, Terminal
from sandboxd.linux import memfd
from sandboxd.linux.descriptors import SCARCE, Descriptors

LARGE_STDIN = 64 << 20
"""Bytes; a file larger than this goes through a pipe instead of a copy in memory."""


class Pipes(msgspec.Struct):
    """The supervisor's ends of a run's streams, and the job's ends until they are handed over."""

    fds: Descriptors
    job_ends: list[int] = msgspec.field(default_factory=list)
    reads: dict[str, int] = msgspec.field(default_factory=dict)
    stdin: int | None = None
    source: int | None = None
    """A file that is fed to stdin, too large for a copy in memory."""
    given: Mapping[str, int] = msgspec.field(default_factory=dict)
    """Streams of the job that somebody else has made: its ends, owned by `fds`."""


def open_pipes(job: Job, pipes: Pipes) -> Pipes:
    """stdin, stdout and stderr of a job; `pipes.fds` owns all ends."""
    fds = pipes.fds
    if job.terminal is not None:
        return open_terminal(job.terminal, pipes)
    given = pipes.given
    pipes.job_ends.append(given["stdin"] if "stdin" in given else open_stdin(job, pipes))
    for name in ("stdout", "stderr"):
        if name in given:
            pipes.job_ends.append(given[name])
            continue
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        fds.own(ours)
        os.set_blocking(ours, False)
        pipes.reads[name] = ours
        pipes.job_ends.append(fds.own(theirs))
    return pipes


def open_stdin(job: Job, pipes: Pipes) -> int:
    fds = pipes.fds
    if isinstance(job.stdin, bytes):
        if not job.stdin:
            return fds.own(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        return fds.own(memfd.sealed(job.stdin))
    if isinstance(job.stdin, Path):
        source = open_input(job.stdin, fds)
        if not stat.S_ISREG(os.fstat(source).st_mode):
            return source  # /dev/null
        if os.fstat(source).st_size <= LARGE_STDIN:
            return fds.own(memfd.sealed_copy(source))
        pipes.source = source
    theirs, ours = os.pipe2(os.O_CLOEXEC)
    fds.own(ours)
    os.set_blocking(ours, False)
    pipes.stdin = ours
    return fds.own(theirs)


def open_input(path: Path, fds: Descriptors) -> int:
    """The file, to be copied from: a job that had its descriptor could open it for writing.

    Of what is no file the end may never come, and who opens a FIFO waits for its writer.
    """
    try:
        opened = fds.own(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in SCARCE:
            raise
        raise JobError(f"stdin: {path}: {error.strerror}") from None
    found = os.fstat(opened)
    if not stat.S_ISREG(found.st_mode) and found.st_rdev != os.stat(os.devnull).st_rdev:
        raise JobError(f"stdin: {path} is no regular file",
                       hint="a pipe is passed on by -i, in Python by stdin=None")  # fmt: skip
    return opened


def open_terminal(terminal: Terminal, pipes: Pipes) -> Pipes:
    """A terminal of the job's own; what it prints is "stdout"."""
    fds = pipes.fds
    ours, theirs = os.openpty()
    fds.own(ours)
    fds.own(theirs)
    resize_terminal(ours, terminal.rows, terminal.columns)
    os.set_blocking(ours, False)
    pipes.reads["stdout"] = ours
    pipes.stdin = ours
    pipes.job_ends += [theirs, fds.own(os.dup(theirs)), fds.own(os.dup(theirs))]
    return pipes


def resize_terminal(fd: int, rows: int, columns: int) -> None:
    """TIOCSWINSZ (ioctl_tty(2)); the foreground processes get SIGWINCH."""
    termios.tcsetwinsize(fd, (rows, columns))
