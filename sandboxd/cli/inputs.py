"""What goes in and out by name on the command line: --file, -e, --env-file, --collect-to."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.errors import JobError
from sandboxd.reference import Reference

if TYPE_CHECKING:
    from sandboxd.result import Artifact

FILE_FORM = "SRC[:NAME], e.g. main.cpp or build/a.out:prog"


# -- the environment -------------------------------------------------------------------------


def environment(
    files: Iterable[str], words: Iterable[str], environ: Mapping[bytes, bytes]
) -> dict[str | bytes, str | bytes]:
    """-e over --env-file, as docker has it: NAME alone passes the caller's value on."""
    env: dict[str | bytes, str | bytes] = {}
    for path in files:
        for number, line in enumerate(_lines(path), 1):
            if line.strip() and not line.lstrip().startswith(b"#"):
                _assign(env, line.lstrip(), environ, f"--env-file {path}:{number}")
    for word in words:
        _assign(env, os.fsencode(word), environ, f"-e {word}")
    return env


def _lines(path: str) -> list[bytes]:
    try:
        return Path(path).read_bytes().splitlines()
    except OSError as error:
        raise JobError(f"--env-file {path}: {error.strerror}") from None


def _assign(
    env: dict[str | bytes, str | bytes], text: bytes, environ: Mapping[bytes, bytes], where: str
) -> None:
    name, equals, value = text.partition(b"=")
    if not name or b"\0" in text:
        raise JobError(f"{where}: no variable can be called that", hint="write NAME=VALUE or NAME")
    if equals:
        env[name] = value
    elif name in environ:
        env[name] = environ[name]


# -- files that go in ------------------------------------------------------------------------


def file(text: str) -> tuple[str, str]:
    """--file SRC[:NAME] -> (host path, name below the working directory)."""
    source, colon, name = text.rpartition(":")
    if not colon:
        source, name = text, os.path.basename(text.rstrip("/"))
    if not source or not name or name.startswith("/") or ".." in name.split("/"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {FILE_FORM} (NAME is relative to /box and without ..)"
        )
    return source, name


def built(text: str) -> tuple[str, str, str]:
    """--built KEY[/PATH][:NAME] -> (digits of the key, path in the build, name here)."""
    what, _, name = text.partition(":")
    key, _, path = what.partition("/")
    name = name or os.path.basename(path) or "."
    if not key or name.startswith("/") or ".." in (*name.split("/"), *path.split("/")):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KEY[/PATH][:NAME], e.g. 1a2b3c4d/a.out:prog"
        )
    return key, path, name


def files(
    wanted: Collection[tuple[str, str]], builds: Collection[tuple[str, str, str]] = ()
) -> dict[str | bytes, Path | Reference]:
    """Name in the working directory -> host path; a directory goes in with all that is below it."""
    for source, _ in wanted:
        try:
            mode = os.stat(source).st_mode
        except OSError as error:
            raise JobError(f"--file {source}: {error.strerror}") from None
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise JobError(f"--file {source}: neither a file nor a directory")
    found: dict[str | bytes, Path | Reference] = {name: Path(source) for source, name in wanted}
    if builds:
        from sandboxd.stores.builds import Store, own_place

        store = Store(own_place())
        for key, path, name in builds:
            found[name] = store.look_up(key).reference().at(path)
    return found


# -- files that come out ---------------------------------------------------------------------


def save(artifacts: Iterable[Artifact], folder: Path) -> None:
    """Write collected files below `folder`. Their names are the job's, so no link is followed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise JobError(f"--collect-to {folder}: {error.strerror}") from None
    try:
        for artifact in artifacts:
            _save(artifact, top, folder)
    finally:
        os.close(top)


def _save(artifact: Artifact, top: int, folder: Path) -> None:
    *parents, name = os.fsencode(artifact.path).split(b"/")
    if any(part in (b"", b".", b"..") for part in (*parents, name)):
        raise JobError(f"--collect-to {folder}: {artifact.path!r} is no name of a file")
    with contextlib.ExitStack() as opened:
        try:
            at = top
            for part in parents:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=at)
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                at = os.open(part, flags, dir_fd=at)
                opened.callback(os.close, at)
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            target = os.open(name, flags, 0o600, dir_fd=at)
            with open(target, "wb") as out:
                if not stat.S_ISREG(os.fstat(target).st_mode):
                    raise JobError(f"--collect-to {folder}: {artifact.path!r} is there already")
                out.truncate()
                out.write(artifact.data)
                os.fchmod(target, artifact.mode & 0o777 & ~_umask())
        except OSError as error:
            raise JobError(f"--collect-to {folder}/{artifact.path}: {error.strerror}") from None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
