"""`sandboxd top`: what a daemon does, live in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sandboxd.cli import exitcodes, remote
from sandboxd.cli.quantities import time as seconds
from sandboxd.errors import JobError, SandboxError

if TYPE_CHECKING:
    from sandboxd.serve.plain import Plain

_DESCRIPTION = """\
Shows what waits, what runs and what it uses, how jobs ended and who failed, again and again; `q`
ends it. Where stdout is no terminal it is shown once. Whoever runs the daemon sees everybody's
jobs, all others their own."""
TARGET = "/v1/overview"
NDJSON = "application/x-ndjson"
FASTEST = 0.2
AGAIN = 1.0
"""Seconds after which a daemon that has gone is asked again."""
_ON, _OFF = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""Another screen without a cursor, and back (xterm's control sequences)."""
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_BOLD, _DIM, _RED, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[0m"
_HEAD = ("ID", "CALLER", "TIME", "CPU", "CPU TIME", "MEMORY", "MOST", "PROCS", "COMMAND")
_FAILED = ("ENDED", "ID", "CALLER", "STATUS", "COMMAND", "WHY")

Row = tuple[str, ...]
Line = tuple[str, str]
"""How it looks, and what it says."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = remote.add(
        subparsers, "top", "show what the daemon does, live", _DESCRIPTION, "--every 500ms"
    )
    parser.add_argument(
        "--every", type=seconds, default=1.0, metavar="T", help="between two looks (default: 1s)"
    )
    parser.add_argument("--json", action="store_true", help="one look, as a JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Shows it."""
    if args.every < FASTEST:
        raise JobError(f"--every {args.every:g}s", hint=f"{FASTEST:g}s or more")
    daemon = remote.daemon(args)
    if args.json:
        print(json.dumps(daemon.ask("GET", TARGET)))
    elif not os.isatty(1) or not os.isatty(0):
        for _, text in lines(daemon.ask("GET", TARGET), {}):
            print(text)
    else:
        daemon.ask("GET", TARGET)  # a daemon that is not there, or knows us not, is said plainly
        _Screen(daemon, args.every).run()
    return exitcodes.OK


# -- what is shown ---------------------------------------------------------------------------


def lines(seen: dict[str, Any], before: dict[str, dict[str, Any]]) -> Iterator[Line]:
    """A look as lines; `before` has the jobs of the last one, by key."""
    whose = "" if seen["everybody"] else f" of {_safe(seen['caller'])}"
    going = "; going down" if seen["draining"] else ""
    yield (
        _BOLD,
        f"sandboxd {seen['version']}: {seen['running']} running, {seen['queued']} waiting{whose};"
        f" {seen['slots']} slots, {seen['spares']} spares{going}",
    )
    callers = (f"{_safe(one['name'])} {one['running']}+{one['queued']}" for one in seen["callers"])
    statuses = (f"{status} {count}" for status, count in seen["statuses"].items())
    yield "", f"callers  {', '.join(callers) or 'none'}"
    yield "", f"ended    {', '.join(statuses) or 'none'}"
    now = datetime.fromisoformat(seen["at"])
    rows = [_running(job, before.get(key)) for key, job in keyed(seen)]
    rows += [_waiting(job, now) for job in seen["waiting"]]
    yield "", ""
    yield from _table(_HEAD, rows, right=range(2, 8))
    if seen["failures"]:
        yield "", ""
        yield from _table(
            _FAILED, [_failure(one) for one in seen["failures"]], right=(), style=_RED
        )


def keyed(seen: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The programs that run, each with a key that is its own."""
    numbers: dict[str, int] = {}
    for job in seen["jobs"]:
        name = f"{job['caller']} {job['id']}"
        numbers[name] = numbers.get(name, 0) + 1
        yield f"{name} {numbers[name]}", job


def _table(head: Row, rows: list[Row], right: Any, style: str = "") -> Iterator[Line]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for number, row in enumerate([head, *rows]):
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (style if number else _DIM), "  ".join(cells).rstrip()


def _running(job: dict[str, Any], last: dict[str, Any] | None) -> Row:
    return (
        _safe(job["id"])[:12], _safe(job["caller"]), _seconds(job["wall_time"]), _share(job, last),
        _seconds(job["cpu_time"]), _size(job["memory"]), _size(job["memory_peak"]),
        "" if job["processes"] is None else str(job["processes"]), _words(job["argv"]),
    )  # fmt: skip


def _waiting(job: dict[str, Any], now: datetime) -> Row:
    waited = (now - datetime.fromisoformat(job["created_at"])).total_seconds()
    caller = _safe(job["caller"])
    empty = ("",) * 5
    return (
        _safe(job["id"])[:12],
        caller,
        _seconds(waited),
        *empty,
        f"(waits) {_words(job['argv'])}",
    )


def _failure(one: dict[str, Any]) -> Row:
    ended = datetime.fromisoformat(one["ended_at"]).astimezone().strftime("%H:%M:%S")
    return (
        ended, _safe(one["id"])[:12], _safe(one["caller"]), _safe(one["status"]),
        _words(one["argv"])[:40], _safe(one["message"]),
    )  # fmt: skip


def _share(job: dict[str, Any], last: dict[str, Any] | None) -> str:
    """CPUs in use since the last look; on the first one, on the average."""
    if job["cpu_time"] is None or job["wall_time"] is None:
        return ""
    cpu, wall = job["cpu_time"], job["wall_time"]
    if last is not None and last["cpu_time"] is not None and last["wall_time"] is not None:
        cpu, wall = cpu - last["cpu_time"], wall - last["wall_time"]
    return f"{max(0.0, 100 * cpu / wall):.0f} %" if wall > 0 else ""


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _size(value: int | None) -> str:
    if value is None:
        return ""
    amount, unit = float(value), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if amount >= 1024:
            amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def _words(argv: list[str]) -> str:
    return _safe(shlex.join(argv))


def _safe(text: str) -> str:
    """What a stranger wrote obeys no terminal."""
    from sandboxd.judge.text import one_line

    return one_line(text, 4096)


# -- the screen ------------------------------------------------------------------------------


class _Screen:
    """A terminal that is ours until `q`, a signal or the end of its input."""

    def __init__(self, daemon: Plain, every: float) -> None:
        self._daemon = daemon
        self._every = every
        self._ours, self._theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._seen: dict[str, Any] | None = None
        self._before: dict[str, dict[str, Any]] = {}
        self._trouble = ""
        self._over = False

    def run(self) -> None:
        import threading

        reader = threading.Thread(target=self._follow, daemon=True)
        with self._taken():
            reader.start()
            while not self._over:
                ready, _, _ = select.select([0, self._ours], [], [])
                if self._ours in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._ours, 4096)
                    self._draw()
                if 0 in ready and self._pressed():
                    return

    @contextlib.contextmanager
    def _taken(self) -> Iterator[None]:
        """The terminal, as it was in every ending."""
        import termios
        import tty

        before = termios.tcgetattr(0)
        endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {one: signal.signal(one, self._end) for one in endings}
        handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: self._wake())
        try:
            tty.setcbreak(0)
            _write(_ON)
            yield
        finally:
            _write(_OFF)
            termios.tcsetattr(0, termios.TCSADRAIN, before)
            for one, handler in handlers.items():
                signal.signal(one, handler)

    def _end(self, *_: object) -> None:
        self._over = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._theirs, b"x")

    def _pressed(self) -> bool:
        keys = os.read(0, 64)
        return not keys or b"q" in keys or b"\x03" in keys or b"\x04" in keys

    def _follow(self) -> None:
        """In a thread: look after look; where the daemon has gone, until it is back."""
        target = f"{TARGET}?every={round(1000 * self._every)}"
        while not self._over:
            try:
                with self._daemon.asking("GET", target, None, {"Accept": NDJSON}) as answer:
                    for line in answer.lines():
                        self._take(json.loads(line), "")
                self._take(self._seen, "the daemon has gone; asking again")
            except SandboxError as error:
                self._take(self._seen, f"{error}; asking again")
            time.sleep(AGAIN)

    def _take(self, seen: dict[str, Any] | None, trouble: str) -> None:
        if seen is not self._seen and self._seen is not None:
            self._before = dict(keyed(self._seen))
        self._seen, self._trouble = seen, trouble
        self._wake()

    def _draw(self) -> None:
        if self._over:
            return
        columns, rows = os.get_terminal_size(1)
        shown = list(lines(self._seen, self._before)) if self._seen is not None else []
        if self._trouble:
            shown.insert(0, (_RED, _safe(self._trouble)))
        if len(shown) > rows:
            shown = [*shown[: rows - 1], (_DIM, f"and {len(shown) - rows + 1} lines more")]
        plain = bool(os.environ.get("NO_COLOR"))
        text = "\n".join(
            f"{'' if plain else style}{line[: columns - 1]}{_PLAIN}{_REST_OF_LINE}"
            for style, line in shown
        )
        _write(f"{_HOME}{text}{_REST}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
