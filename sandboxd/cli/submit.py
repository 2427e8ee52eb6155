"""`sandboxd submit`: a job for the daemon, which goes on with it whatever becomes of us."""

from __future__ import annotations

import argparse
import base64
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sandboxd.cli import exitcodes, inputs, remote
from sandboxd.cli.quantities import count, job_name, size, time
from sandboxd.errors import JobError

if TYPE_CHECKING:
    from sandboxd.serve.plain import Plain

_DESCRIPTION = """\
Hands a job to the daemon and prints its id. The job is accepted then: it survives the end of this
command, of the connection and of the daemon. Limits may only be lower than the policy's."""
SMALL = 256 << 10
"""Bytes of a file that goes along with its job; a larger one is stored first."""
PIECE = 256 << 10
_LIMITS: Mapping[str, tuple[Any, str, str]] = MappingProxyType(
    {
        "memory": (size, "SIZE", "memory of all processes together"),
        "pids-limit": (count, "N", "processes and threads alive at once"),
        "cpu-time": (time, "T", "CPU seconds of all processes together"),
        "wall-time": (time, "T", "seconds from start to end"),
        "idle-time": (time, "T", "seconds in a row with almost no CPU used"),
        "output": (size, "SIZE", "bytes of stdout and stderr together"),
        "disk": (size, "SIZE", "bytes in all writable places together"),
    }
)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = remote.add(
        subparsers, "submit", "hand a job to the daemon", _DESCRIPTION,
        "-p judge-native --file a.out --stdin 1.in -- ./a.out",
    )  # fmt: skip
    parser.add_argument("-p", "--policy", default="base", metavar="POLICY", help="its name")
    parser.add_argument(
        "--name", type=job_name, metavar="ID", help="the job's id (default: a random one)"
    )
    parser.add_argument(
        "--priority", type=int, choices=range(10), default=5, metavar="N",
        help="0 to 9 among your jobs; 9 is first (default: 5)",
    )  # fmt: skip
    parser.add_argument(
        "--on-lost", choices=("report", "retry"), default="report",
        help="if the daemon dies while it runs: report it lost (default), or start it again",
    )  # fmt: skip
    parser.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="set a variable, or pass the caller's on",
    )  # fmt: skip
    parser.add_argument("-w", "--workdir", metavar="DIR", help="relative to /box (the default)")
    parser.add_argument("--stdin", type=Path, metavar="FILE", help="stdin is the content of FILE")
    parser.add_argument(
        "--file", action="append", default=[], type=inputs.file, metavar="SRC[:NAME]",
        help="copy a file, or the files in a directory, into /box",
    )  # fmt: skip
    parser.add_argument(
        "--collect", action="append", default=[], metavar="PATTERN",
        help="keep files, e.g. 'out/*.png'; `sandboxd wait --collect-to` gets them",
    )  # fmt: skip
    for name, (read, metavar, text) in _LIMITS.items():
        short = ["-m"] if name == "memory" else []
        parser.add_argument(*short, f"--{name}", type=read, metavar=metavar, help=text)
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="CMD", help="the program and its arguments"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Submits it and prints its id."""
    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not words:
        raise JobError("no program to run", hint="name one: sandboxd submit -- echo hello")
    daemon = remote.daemon(args)
    job: dict[str, Any] = {
        "argv": [_text(os.fsencode(word)) for word in words],
        "policy": args.policy,
        "priority": args.priority,
        "on_lost": args.on_lost,
        "env": {
            os.fsdecode(name): _text(os.fsencode(value))
            for name, value in inputs.environment((), args.env, os.environb).items()
        },
        "collect": args.collect,
        "files": {},
    }
    limits = {name.replace("-", "_"): vars(args)[name.replace("-", "_")] for name in _LIMITS}
    limits["processes"] = limits.pop("pids_limit")
    if given := {name: value for name, value in limits.items() if value is not None}:
        job["limits"] = given
    if args.name is not None:
        job["id"] = args.name
    if args.workdir is not None:
        job["cwd"] = _text(os.fsencode(os.path.join("/box", args.workdir)))
    if args.stdin is not None:
        job["stdin"] = _content(daemon, args.stdin, f"--stdin {args.stdin}")
    for source, name in args.file:
        for path, inner in _files(Path(source), name):
            content = _content(daemon, path, f"--file {path}")
            job["files"][inner] = {**content, "mode": os.stat(path).st_mode & 0o777}
    view = daemon.ask("POST", "/v1/jobs", job)
    sys.stdout.write(f"{view['id']}\n")
    return exitcodes.OK


def _text(data: bytes) -> Any:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(data).decode()}


def _files(source: Path, name: str) -> Iterator[tuple[Path, str]]:
    """A file, or all that is in a directory; JobError for what has no place in a submission."""
    if not source.is_dir():
        yield source, name
        return
    for path in sorted(source.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise JobError(f"--file {path}: neither file nor directory",
                           hint="submit an archive, and unpack it in the job")  # fmt: skip
        if path.is_file():
            yield path, f"{name}/{path.relative_to(source)}"


def _content(daemon: Plain, path: Path, where: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= SMALL:
                data = _text(file.read())
                return data if isinstance(data, dict) else {"data": data}
            import hashlib  # not for those whose files are small

            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            pieces = iter(lambda: file.read(PIECE), b"")
            with daemon.asking("PUT", f"/v1/files/{digest}", pieces) as answer:
                answer.body()
            return {"sha256": digest}
    except OSError as error:
        raise JobError(f"{where}: {error.strerror}") from None
