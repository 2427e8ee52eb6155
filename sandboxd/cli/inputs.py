"""What goes in by name on the command line: --file, --files-from, -e, --env-file."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.errors import JobError

if TYPE_CHECKING:
    from sandboxd.job import Input, Pattern

STDIN = 0
FILE_FORM = "SRC[:NAME], e.g. main.cpp or build/a.out:prog"


# -- what is collected -----------------------------------------------------------------------


def add_collect(group: argparse._ArgumentGroup, text: str) -> None:
    """The flags for `patterns`; `text` is the help of the first."""
    same = "the same, and it is "
    texts = {
        "--collect": text,
        "--collect-optional": f"{same}no error if there is none",
        "--collect-required": f"{same}an error if there is none, also with wildcards",
    }
    for name, words in texts.items():
        group.add_argument(name, action="append", default=[], metavar="PATTERN", help=words)


def patterns(args: argparse.Namespace) -> list[Pattern]:
    """What these flags say."""
    from sandboxd.job import Pattern

    return [
        *(Pattern(name) for name in args.collect),
        *(Pattern(name, required=False) for name in args.collect_optional),
        *(Pattern(name, required=True) for name in args.collect_required),
    ]


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
    if not name or b"\0" in text or (where.startswith("--env-file") and len(name.split()) != 1):
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


def archive(text: str) -> tuple[str, str]:
    """--files-from SRC[:DIR] -> (host path or -, directory below the working directory)."""
    source, colon, name = text.rpartition(":")
    if not colon:
        source, name = text, "."
    if not source or not name or name.startswith("/") or ".." in name.split("/"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not FILE[:DIR] or -[:DIR] (DIR is relative to /box and without ..)"
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
    wanted: Collection[tuple[str, str]],
    archives: Collection[tuple[str, str]] = (),
    builds: Collection[tuple[str, str, str]] = (),
) -> dict[str | bytes, Input]:
    """Name in the working directory -> what goes there; archives first, so that a file may lie over
    what was in one. A directory goes in with all that is below it. Several may have one name.
    """
    for source, _ in wanted:
        check_source(source)
    if sum(source == "-" for source, _ in archives) > 1:
        raise JobError("--files-from - stands there twice", hint="stdin is read once")
    from sandboxd.job import Tar  # not for `sandboxd submit`, which is to start at once

    found: dict[str | bytes, Input] = {}

    def add(name: str, what: Input) -> None:
        while name in found:
            name = f".//{name}"  # another key, not another directory
        found[name] = what

    for source, name in archives:
        add(name, Tar(STDIN if source == "-" else Path(source)))
    for source, name in wanted:
        add(name, Path(source))
    if builds:
        from sandboxd.stores.builds import Store, own_place

        store = Store(own_place())
        for key, path, name in builds:
            add(name, store.look_up(key).reference().at(path))
    return found


def check_source(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise JobError(f"--file {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise JobError(f"--file {path}: neither a file nor a directory")
