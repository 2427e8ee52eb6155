"""`sandboxd build`: one program run once, its files kept for any number of runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from sandboxd.cli import exitcodes, flags, inputs
from sandboxd.cli.main import say
from sandboxd.cli.quantities import size
from sandboxd.result import to_json

if TYPE_CHECKING:
    from sandboxd.job import Job
    from sandboxd.supervise.builds import Build

SCHEMA = "sandboxd.built/1"
_MIB = 1 << 20

_DESCRIPTION = """\
Runs one program unless that was done before with the same inputs, and keeps the files it made.
Inputs are the program's words, its environment, its input files, the policy, and the compilers and
libraries of the root. What was made is shown read-only to other runs, and never copied. A program
that fails leaves nothing."""
_EPILOG = """\
The key goes to stdout, what the program said to stderr. With a build from the store nothing is run,
and what it said then is said again.

examples:
  sandboxd build -p compile --file main.c --collect a.out -- gcc -O2 main.c
  sandboxd run --built 1a2b3c4d/a.out:prog -- ./prog
  KEY=$(sandboxd build -q -p compile --file main.c --collect a.out -- gcc main.c)

exit status: 0 it is in the store; else as of `sandboxd run`"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "build",
        help="run one program once, and keep what it made for many runs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="sandboxd build [-p POLICY] [flags] --collect PATTERN [--] CMD...",
    )
    group = parser.add_argument_group("what is kept")
    inputs.add_collect(group, "files that are kept, e.g. a.out or 'classes/**'")
    group.add_argument(
        "--salt", default="", metavar="TEXT", help="another TEXT is another build, whatever else"
    )
    group.add_argument(
        "--keep-output", type=size, default=_MIB, metavar="SIZE",
        help="bytes kept of what the program says (default: 1M)",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print one JSON object")
    group.add_argument("-q", "--quiet", action="store_true", help="print the whole key alone")
    flags.add(parser)
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Builds; returns the exit status."""
    import trio

    base, meant = flags.described(args)
    wanted = flags.policy(args, base)
    more = {"collect": inputs.patterns(args), "keep": args.keep_output}
    job = flags.job(args, wanted, more, meant)
    for what, why in () if args.quiet or args.json else job.ignored:
        say(f"not done: {what} ({why})")
    began = time.monotonic()
    built = trio.run(_build, job, args.salt.encode("utf-8", "surrogateescape"), args.cgroup)
    if args.json:
        print(json.dumps(_json(built)))
        return exitcodes.exit_code(built.result)
    if not args.quiet or not built.ok:
        sys.stdout.flush()
        sys.stderr.buffer.write(built.result.stdout + built.result.stderr)
        sys.stderr.buffer.flush()
    if not built.ok:
        return _failed(built)
    how = "from the store" if built.cached else f"built in {time.monotonic() - began:.2f} s"
    print(built.key if args.quiet else f"{built.key[:12]}  {contents(built)}, {how}")
    return exitcodes.OK


async def _build(job: Job, salt: bytes, cgroup: str | None) -> Build:
    from sandboxd.supervise.runner import open_runner

    async with open_runner(slots=1, cgroup=cgroup) as runner:
        return await runner.build(job, salt=salt)


def _failed(built: Build) -> int:
    result = built.result
    say(f"nothing is kept: {result.status}{f' ({result.message})' if result.message else ''}")
    for problem in result.artifact_errors:
        say(f"not collected: {problem.path} ({problem.reason})")
    return exitcodes.exit_code(result)


def contents(built: Build) -> str:
    files = built.result.artifacts
    total = sum(one.bytes for one in files) / _MIB
    return f"{len(files)} file{'' if len(files) == 1 else 's'}, {total:.1f} MiB"


def _json(built: Build) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "key": built.key,
        "kept": built.ok,
        "cached": built.cached,
        "result": to_json(built.result),
    }
