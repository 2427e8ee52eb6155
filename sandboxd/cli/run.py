"""`sandboxd run`: one program in a sandbox, its output as it comes, then what it used."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.cli import attach, away, committing, exitcodes, flags, inputs, remote
from sandboxd.cli.attach import STDERR, STDOUT, Ending, Output
from sandboxd.cli.lacking import not_enforced
from sandboxd.cli.main import bug, complain, first_error, say, unwritten
from sandboxd.cli.quantities import size, time
from sandboxd.errors import JobError, SandboxError

if TYPE_CHECKING:
    from sandboxd.result import Event, Kept, Result

_DESCRIPTION = """\
Runs one program in a sandbox of its own. Its output streams as it comes; what it used, and what
was not enforced, follows on stderr. Flags are docker run's where docker has one. The first word
that is no flag is the program."""
_EPILOG = """\
Without -i stdin is empty. With -t and -i every key goes to the program, Ctrl-C too; without, Ctrl-C
and SIGTERM kill it and leave nothing. Flags and POLICY together make a policy of their own, so they
may raise its limits as well as lower them.

examples:
  sandboxd run -- python3 -c 'print(6*7)'
  sandboxd run -m 256M --cpu-time 2s --file a.out --stdin 1.in -- ./a.out
  sandboxd run -v ./src:/src:ro --tmpfs /out:size=64M -w /src -- make O=/out
  sandboxd run -p shell -it -- bash
  sandboxd run --bundle ./bundle              # as runc and crun take them

exit status: the program's own; 124 time limit, 125 sandboxd failed, 126 cannot execute, 127 not
found, 128+N ended by signal N, 137 memory limit, 153 output limit; 2 wrong usage. The exact status
is in --json and --result-fd."""
_MIB = 1 << 20
SHORTEST_USAGE = 0.01
Ignored = tuple[tuple[str, str], ...]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="run one program in a sandbox",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="sandboxd run [-p POLICY] [flags] [--] CMD...",
    )
    remote.add_host(
        parser, "have it run by a daemon: unix:///path or http://HOST:PORT (default:"
        " $SANDBOXD_HOST, else here; `local`: here)"
    )  # fmt: skip
    group = parser.add_argument_group("what comes out")
    group.add_argument(
        "--json",
        action="store_const",
        const="once",
        help="print nothing but one JSON object when done (schema sandboxd.result/1)",
    )
    group.add_argument(  # an option string with its value, so that `--json CMD` is not misread
        "--json=stream",
        action="store_const",
        const="stream",
        dest="json",
        help="print nothing but events, one JSON object a line; the last has the result",
    )
    group.add_argument(
        "--usage-every",
        type=_every,
        metavar="T",
        help="with --json=stream: every so often an event that says what it has used, e.g. 500ms",
    )
    group.add_argument(
        "--result-fd", type=_descriptor, metavar="N", help="write the JSON object to descriptor N"
    )
    _add_collect(group)
    group.add_argument(
        "--keep-output",
        type=size,
        default=_MIB,
        metavar="SIZE",
        help="bytes of each stream kept for the JSON object (default: 1M)",
    )
    committing.add(group)
    group.add_argument("-q", "--quiet", action="store_true", help="no accounting on stderr")
    flags.add(parser)
    parser.set_defaults(func=run, following=0)


def _add_collect(group: argparse._ArgumentGroup) -> None:
    inputs.add_collect(group, "copy files out afterwards, e.g. 'out/*.png'; needs --collect-to")
    group.add_argument(
        "--collect-to", type=Path, metavar="DIR", help="where collected files are written to"
    )


def _every(text: str) -> float:
    found = time(text)
    if found < SHORTEST_USAGE:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 10ms")
    return found


def _descriptor(text: str) -> int:
    try:
        number = int(text)
        mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no open descriptor: open one in the shell, e.g. 3>result.json"
        ) from None
    if mode == os.O_RDONLY:
        raise argparse.ArgumentTypeError(f"descriptor {text} is not open for writing")
    return number


def run(args: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    if args.result_fd is not None:
        os.set_inheritable(args.result_fd, False)
    try:
        return _run(args)
    except Exception as error:
        found = first_error(error)
        if not isinstance(found, KeyboardInterrupt | BrokenPipeError):
            from sandboxd.result import failure_json

            said = found if isinstance(found, SandboxError) else bug(found)
            with contextlib.suppress(BrokenPipeError, SandboxError):
                _deliver(args, failure_json(said))
        raise


def _run(args: argparse.Namespace) -> int:
    collected = bool(args.collect or args.collect_optional or args.collect_required)
    if collected and args.collect_to is None:
        raise JobError("--collect without --collect-to", hint="say where to: --collect-to DIR")
    if args.usage_every is not None and args.json != "stream":
        raise JobError("--usage-every without --json=stream", hint="only its events have usage")
    if away.wanted(args):
        meant = away.described(args)
        ignored = () if meant is None else meant.ignored
        _tell(args, ignored)
        return _end(args, away.run(args, meant), ignored)
    base, meant = flags.described(args)
    wanted = flags.policy(args, base)
    if args.commit is not None:
        committing.check(args.commit, wanted)
    more: dict[str, Any] = {"keep": args.keep_output, "keep_root": bool(args.keep or args.commit)}
    if collected:
        more |= {"collect": inputs.patterns(args), "collect_to": args.collect_to}
    job = flags.job(args, wanted, more, meant)
    _tell(args, job.ignored)
    import trio

    beyond = attach.Wanted(args.cgroup, args.usage_every)
    return _end(args, trio.run(attach.attached, job, _output(args), beyond), job.ignored)


def _tell(args: argparse.Namespace, ignored: Ignored) -> None:
    for what, why in () if args.quiet or args.json else ignored:
        say(f"not done: {what} ({why})")


def _end(args: argparse.Namespace, ending: Ending, ignored: Ignored) -> int:
    if ending.result is None:
        return _hurried(args, ending)
    return _finish(args, ending, ending.result, ignored)


def _hurried(args: argparse.Namespace, ending: Ending) -> int:
    """A signal came before there was anything to tell, or a second one while we waited for it."""
    from sandboxd.result import failure_json

    assert ending.signal is not None
    name = signal.Signals(ending.signal).name
    error = SandboxError(f"ended by {name} before there was a result")
    _deliver(args, failure_json(error))
    complain(error)
    return exitcodes.SIGNAL + ending.signal


def _finish(args: argparse.Namespace, ending: Ending, result: Result, ignored: Ignored) -> int:
    if ending.error is not None and not isinstance(ending.error, BrokenPipeError):
        raise unwritten(ending.error)
    if args.commit is not None:
        committing.finish(result, args.commit, stays=args.keep)
    if ending.error is None and (args.json or args.result_fd is not None):
        _deliver(args, ending.record or _record(result))
    if not args.quiet and args.json is None:
        if ending.open_line:
            print(file=sys.stderr)
        for line in accounting(result, told={what for what, _ in ignored}):
            say(line)
    if ending.error is not None:
        return exitcodes.BROKEN_PIPE
    return (
        exitcodes.exit_code(result) if ending.signal is None else exitcodes.SIGNAL + ending.signal
    )


def _record(result: Result) -> dict[str, Any]:
    from sandboxd.result import to_json

    return to_json(result)


# -- JSON ------------------------------------------------------------------------------------


def _output(args: argparse.Namespace) -> Output:
    """What goes where for each event."""

    def line(event: Event) -> tuple[int, bytes]:
        from sandboxd.result import event_json

        args.following = event.seq + 1
        return STDOUT, _line(event_json(event))

    forms: dict[str | None, Output] = {"once": lambda _: None, "stream": line, None: _streams}
    return forms[args.json]


def _streams(event: Event) -> tuple[int, bytes] | None:
    if event.type in ("stdout", "stderr"):
        return (STDOUT if event.type == "stdout" else STDERR), event.data
    return None


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _deliver(args: argparse.Namespace, value: dict[str, Any]) -> None:
    """The result, or why there is none, to where it is wanted."""
    if args.result_fd is not None:
        try:
            attach.write_all(args.result_fd, _line(value))
        except OSError as error:
            say(f"--result-fd {args.result_fd}: {error.strerror}")
    if args.json == "once":
        _print(value)
    elif args.json == "stream" and value["status"] == "error":
        _print({"v": 1, "seq": args.following, "type": "exit", "result": value})


def _print(value: dict[str, Any]) -> None:
    try:
        attach.write_all(STDOUT, _line(value))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritten(error) from None


# -- the accounting --------------------------------------------------------------------------


def accounting(result: Result, told: Collection[str] = ()) -> Iterator[str]:
    """A few lines for a person: how it ended, what it used, what else was not enforced."""
    usage = result.usage
    parts = [_ended(result)]
    if usage.cpu_time is not None:
        parts.append(f"cpu {usage.cpu_time:.3f} s")
    if usage.wall_time is not None:
        parts.append(f"wall {usage.wall_time:.3f} s")
    if usage.memory_peak is not None:
        parts.append(f"memory {usage.memory_peak / _MIB:.1f} MiB ({usage.memory_peak_source})")
    yield ", ".join(parts)
    if result.kept is not None:
        yield _kept(result.kept)
    for problem in result.artifact_errors:
        yield f"not collected: {problem.path} ({problem.reason})"
    if lacking := [one for one in result.degraded if one.what not in told]:
        yield f"not enforced: {not_enforced((one.what, one.why) for one in lacking)}"


def _kept(kept: Kept) -> str:
    numbers = ", ".join(f"{count} {what}" for what, count in kept.counts.items()) or "no change"
    return f"kept: {kept.name} ({numbers}{'' if kept.complete else '; not all of it'})"


def _ended(result: Result) -> str:
    """The status in words; what the message only repeats is left out."""
    if result.status == "ok":
        return "ok"
    if result.status == "nonzero_exit":
        return f"nonzero_exit {result.exit_code}"
    if result.status == "signaled" and result.signal is not None:
        sender = f" by {result.signal.sender}" if result.signal.sender else ""
        return f"signaled {result.signal.name}{sender}"
    return f"{result.status} ({result.message})"
