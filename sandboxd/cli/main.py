"""The command line: finds the command, reads its module and no other, and says what went wrong.

Starting up must cost next to nothing (`sandboxd --help`, `policy list` in a shell's completion), so
the commands stand here by name, with the line of help that their own parser repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

from sandboxd.cli import exitcodes
from sandboxd.errors import (
    ImageError,
    InternalError,
    JobError,
    PolicyError,
    PolicyErrors,
    SandboxError,
)

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "run": "run one program in a sandbox",
        "group": "run jobs that reach each other",
        "build": "run one program once, and keep what it made for many runs",
        "cache": "list, check and remove what builds made",
        "volume": "make, list and remove volumes and caches",
        "judge": "judge submissions against a problem package",
        "serve": "serve jobs over HTTP",
        "submit": "hand a job to the daemon",
        "ps": "list the daemon's jobs",
        "logs": "show the output of a job",
        "wait": "wait for a job, and exit as it did",
        "cancel": "cancel jobs",
        "top": "show what the daemon does, live",
        "plan": "show what would be done to run a program",
        "diff": "what a kept run changed in its root",
        "commit": "make an image of a kept run",
        "kept": "list and remove what runs with --keep changed",
        "image": "import, list, check and remove images",
        "policy": "list, show, check and explain policies",
        "doctor": "what works on this machine, and how to fix what does not",
        "setup": "what an administrator does once, shown or done",
    }
)
"""Command, and so the module in this room -> its line of help."""

_DESCRIPTION = """\
Runs programs nobody trusts on Linux without root, and says what they used and why they ended."""
_EXAMPLE = """\
examples:
  sandboxd run -- python3 -c 'print(6*7)'
  sandboxd run -m 256M --cpu-time 2s --file a.out -- ./a.out
  sandboxd judge examples/different examples/different/submissions/accepted/different.cpp
  sandboxd doctor

`sandboxd COMMAND --help` says more about each."""


class _Parser(argparse.ArgumentParser):
    """Its error for a word that is no command of a command names the nearest one."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        near = _nearest(wrong[1], re.findall(r"[\w-]+", wrong[2])) if wrong else ""
        super().error(f"{message}; {near}" if near else message)


class _Version(argparse.Action):
    """--version, looked up when asked for: importlib.metadata takes longer than all the rest."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        print(f"sandboxd {version()}")
        parser.exit(exitcodes.OK)


def version() -> str:
    """The version of the package this room is part of."""
    return str(sys.modules["sandboxd"].__version__)


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def command_parser(chosen: str | None = None) -> tuple[argparse.ArgumentParser, Commands]:
    """The command line with all commands by name, or with the chosen one and its flags."""
    parser: argparse.ArgumentParser = _Parser(
        prog="sandboxd",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the version of sandboxd and exit"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command_name")
    if chosen is not None:
        importlib.import_module(f"sandboxd.cli.{chosen}").register(commands)
    else:
        for name, line in COMMANDS.items():
            commands.add_parser(name, help=line, add_help=False)
    return parser, commands


class _UnwrittenError(OSError):
    """What stdout could not take."""


class _Stdout(io.FileIO):
    """Descriptor 1, whose errors can be told from those of other files."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _UnwrittenError(error.errno, error.strerror) from None


def _own_stdout() -> None:
    """print() through _Stdout; as it was in all else."""
    old = sys.stdout
    if isinstance(old, io.TextIOWrapper):
        old.flush()
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Stdout(1, "w", closefd=False)),
            encoding=old.encoding, errors=old.errors, line_buffering=old.line_buffering,
            write_through=old.write_through,
        )  # fmt: skip


def entry() -> NoReturn:
    """The console script."""
    _open_standard_descriptors()
    _own_stdout()
    try:
        status: object = main(sys.argv[1:])
    except SystemExit as error:  # argparse's: it has said all there is to say
        status = error.code
    _flush()
    # A thread may still wait in write(2) for a reader who never comes: taking the interpreter to
    # pieces under it is no use to anyone, and takes as long as starting did.
    os._exit(status if isinstance(status, int) else exitcodes.OK)


def main(argv: Sequence[str]) -> int:
    """Carries one command line out; returns the exit status. argparse's own exits go through."""
    name = next((word for word in argv if not word.startswith("-")), None)
    for stream in (sys.stdout, sys.stderr):
        # Names may be any bytes and a terminal may know ASCII only: neither is a reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    asked = argparse.Namespace()
    try:
        status = _main(argv, name, asked)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = exitcodes.SIGNAL + 2
    except BrokenPipeError:
        status = _broken_pipe()
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        status = _failed(name, error, asked)
    return status


def _main(argv: Sequence[str], name: str | None, asked: argparse.Namespace) -> int:
    """`asked` is filled in, so that whoever says what went wrong knows what was asked for."""
    if name is not None and name not in COMMANDS:
        return _usage(f"no such command: {name}", _nearest(name, COMMANDS))
    parser, commands = command_parser(name)
    if name is None and (wrong := [word for word in argv if word not in _flags(parser)]):
        return _unknown_flag(parser, "", wrong[0])
    args, unknown = parser.parse_known_args(argv, asked)
    if unknown and name is not None:
        return _unknown_flag(*_deepest(commands, argv, []), unknown[0])
    status: int = args.func(args)
    return status


# -- what went wrong -------------------------------------------------------------------------


def _usage(message: str, hint: str) -> int:
    say(message)
    say(hint or "`sandboxd --help` lists what there is")
    return exitcodes.USAGE


def _unknown_flag(parser: argparse.ArgumentParser, name: str, word: str) -> int:
    """argparse would name the flag only; the nearest one is more use."""
    flag = word.partition("=")[0]
    start = f"{name}: " if name else ""
    what = f"{start}no such flag: {flag}" if flag.startswith("-") else f"{start}unexpected {word}"
    help_of = " ".join(filter(None, ("sandboxd", name, "--help")))
    return _usage(what, _nearest(flag, _flags(parser)) or f"`{help_of}` lists the flags")


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return re.findall(r"(?<![\w-])--?[a-z][a-z-]*", parser.format_help())


def _deepest(
    commands: Commands, argv: Sequence[str], names: list[str]
) -> tuple[argparse.ArgumentParser, str]:
    """The parser of the command that these words name, or of the command of a command."""
    chosen = next(word for word in argv if word in commands.choices)
    parser, names = commands.choices[chosen], [*names, chosen]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return _deepest(action, argv[argv.index(chosen) + 1 :], names)
    return parser, " ".join(names)


def _nearest(word: str, known: Mapping[str, str] | Sequence[str]) -> str:
    import difflib

    found = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {found[0]}?" if found else ""


def _failed(name: str | None, error: BaseException, asked: argparse.Namespace) -> int:
    """Says what sandboxd could not do; anything but a SandboxError is a bug of ours."""
    found = first_error(error)
    if isinstance(found, KeyboardInterrupt):
        return exitcodes.SIGNAL + 2
    if isinstance(found, BrokenPipeError):
        return _broken_pipe()
    found = _ours(found)
    if not isinstance(found, SandboxError):
        import traceback

        traceback.print_exception(error)
        say("this is a bug in sandboxd: please report it with the lines above")
        _say_json(name, bug(found), asked)
        return exitcodes.SANDBOXD_FAILED
    complain(found)
    _say_json(name, found, asked)
    own_fault = isinstance(found, PolicyError | JobError | ImageError)
    runs = name in ("run", "build", "group", "wait")  # 1 is what a program may end with
    return exitcodes.FAILED if own_fault and not runs else exitcodes.SANDBOXD_FAILED


def _ours(error: BaseException) -> BaseException:
    """An OSError of which it is known what it means to who typed the command."""
    if isinstance(error, _UnwrittenError):
        return unwritten(error)
    if isinstance(error, FileNotFoundError) and error.filename is None:
        try:
            os.getcwd()
        except FileNotFoundError:
            return JobError("the directory that this is typed in is gone", hint="cd to another")
    return error


def unwritten(error: OSError) -> SandboxError:
    """stdout is on a full disk, or the like."""
    return SandboxError(f"output cannot be written: {error.strerror}")


def bug(error: BaseException) -> InternalError:
    """What an exception that nobody meant is called where there is no traceback."""
    return InternalError(f"{type(error).__name__}: {error}", hint="this is a bug: please report it")


def _say_json(name: str | None, error: SandboxError, asked: argparse.Namespace) -> None:
    """Who wants JSON gets some in this ending, too; `run` has a record of its own for it."""
    if name != "run" and getattr(asked, "json", None):
        from sandboxd.result import error_json

        say_json(error_json(error))


def say_json(error: Mapping[str, Any]) -> None:
    """Why there is nothing else, on stdout."""
    import json

    with contextlib.suppress(OSError, ValueError):
        print(json.dumps({"schema": "sandboxd.error/1", "status": "error", "error": error}))
        sys.stdout.flush()


def first_error(error: BaseException) -> BaseException:
    """The first error in a group that says what happened, as nurseries wrap what they let out."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = list(_leaves(error))
    return next((one for one in leaves if isinstance(one, SandboxError)), leaves[0])


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def complain(error: SandboxError) -> None:
    """The message, and below it what to do."""
    for one in error.errors if isinstance(error, PolicyErrors) else (error,):
        say(str(one.args[0]))
        if one.hint:
            say(f"  {one.hint}")


def say(message: str) -> None:
    """Lines of ours on stderr; what a stranger wrote obeys no terminal."""
    from sandboxd.judge.text import printable

    with contextlib.suppress(OSError, ValueError):
        for line in printable(message, 1 << 16).splitlines():
            print(f"sandboxd: {line}", file=sys.stderr)
        sys.stderr.flush()


def _broken_pipe() -> int:
    """Who read our output is gone: as if SIGPIPE, which Python ignores, had ended us."""
    _flush()
    return exitcodes.BROKEN_PIPE


def _flush() -> None:
    """What cannot be written now is dropped, else Python tries again at its end and complains."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _open_standard_descriptors() -> None:
    """A descriptor of 0-2 that is closed would soon be a socket of ours, and be written to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
