"""A run in the foreground: its streams are ours, our signals end it, our terminal is its terminal.

Theory of operation. One line of code reads the events and writes them out, so that their order
stays and a reader of ours who is slow stalls the job. Writing happens in a thread: a pipe nobody
reads must not keep signals and time limits from being noticed. A signal (or a reader who went
away) kills the run; what it still has to say gets a moment to be written, then is dropped, and
the last event brings the result as always. A second signal does not wait for that either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from sandboxd.cli.flags import window
from sandboxd.errors import SandboxError

if TYPE_CHECKING:
    import trio

    from sandboxd.job import Job
    from sandboxd.result import Event, Result
    from sandboxd.supervise.run import Run

STDIN, STDOUT, STDERR = 0, 1, 2
CHUNK = 65536
LAST_WORDS = 0.5
"""Seconds a run that was killed gets until its output is no longer waited for."""
PATIENCE = 5.0
"""Seconds until its result is no longer waited for; leaving the runner kills it anyway."""
END_OF_FILE = b"\x04"  # VEOF of a terminal in its usual mode (termios(3))

Output = Callable[["Event"], tuple[int, bytes] | None]
"""What to write where for an event, if anything."""


class Ending:
    """How it went: the result, unless we were in too much of a hurry, and what made us stop."""

    def __init__(self) -> None:
        self.result: Result | None = None
        self.record: dict[str, Any] | None = None
        """The result as JSON, where it came so."""
        self.signal: int | None = None
        self.error: OSError | None = None
        """Why output could not be written."""
        self.open_line = False
        """What was last shown on a terminal was not the end of a line."""


class _Foreground:
    def __init__(
        self, ending: Ending, everything: trio.CancelScope, writing: trio.CancelScope
    ) -> None:
        self.ending = ending
        self.everything = everything
        self.writing = writing
        self.run: Run | None = None

    def end(self) -> None:
        """Kill the run; give it a moment for its last words and its result."""
        import trio

        if self.run is None or self.ending.signal is not None:
            self.everything.cancel()
            return
        self.run.kill()
        now = trio.current_time()
        self.writing.deadline = min(self.writing.deadline, now + LAST_WORDS)
        self.everything.deadline = now + PATIENCE


class Wanted(NamedTuple):
    """What the command line asks for beyond the job."""

    cgroup: str | None = None
    usage_every: float | None = None


async def attached(job: Job, output: Output, wanted: Wanted) -> Ending:
    """Carry a job out in the foreground. SandboxError is what sandboxd could not do."""
    import trio

    from sandboxd.supervise.runner import open_runner

    ending = Ending()
    with contextlib.ExitStack() as stack:
        if job.terminal is not None and job.stdin is None:
            stack.enter_context(raw_terminal())
        signals = stack.enter_context(trio.open_signal_receiver(*wanted_signals()))
        async with trio.open_nursery() as nursery:
            here = _Foreground(ending, nursery.cancel_scope, trio.CancelScope())
            nursery.start_soon(_obey, signals, here)
            async with (
                open_runner(slots=1, cgroup=wanted.cgroup) as runner,
                runner.start(job, usage_every=wanted.usage_every) as run,
            ):
                here.run = run
                if run.stdin is not None:
                    nursery.start_soon(_feed, run.stdin, job.terminal is not None)
                await _follow(run, here, output)
            nursery.cancel_scope.cancel()
    return ending


def wanted_signals() -> list[signal.Signals]:
    """All that would end us, unless who started us had them ignored (nohup, `&` in a script)."""
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    wanted = [one for one in endings if signal.getsignal(one) is not signal.SIG_IGN]
    return [*wanted, signal.SIGWINCH]


async def _obey(signals: AsyncIterator[int], here: _Foreground) -> None:
    async for number in signals:
        if number == signal.SIGWINCH:
            if here.run is not None:
                here.run.resize(**window())
        else:
            here.end()
            here.ending.signal = here.ending.signal or number


async def _follow(run: Run, here: _Foreground, output: Output) -> None:
    """Show the events to the last one."""
    with here.writing:
        async for event in run.events:
            here.ending.result = event.result
            if (piece := output(event)) is not None:
                try:
                    await write(*piece)
                except OSError as error:
                    here.ending.error = error
                    here.end()
                    break
                here.ending.open_line = leaves_line_open(*piece)
    async for event in run.events:
        here.ending.result = event.result
    here.ending.result = await run.wait()


def leaves_line_open(fd: int, data: bytes) -> bool:
    return not data.endswith(b"\n") and os.isatty(fd)


async def write(fd: int, data: bytes) -> None:
    import trio

    await trio.to_thread.run_sync(write_all, fd, data, abandon_on_cancel=True)


def write_all(fd: int, data: bytes) -> None:
    """Also where whoever gave us the descriptor made it nonblocking."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            writable = select.poll()
            writable.register(fd, select.POLLOUT)
            writable.poll()


# -- stdin -----------------------------------------------------------------------------------


async def _feed(stdin: trio.abc.SendStream, terminal: bool) -> None:
    """Forward our stdin to its end; a job that closed its own is no reason to stop."""
    import trio

    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        last = b"\n"
        while data := await _read():
            last = data[-1:]
            await stdin.send_all(data)
        if terminal:  # in the middle of a line the first one only ends the line
            await stdin.send_all(END_OF_FILE if last == b"\n" else END_OF_FILE * 2)
        await stdin.aclose()


async def _read() -> bytes:
    import trio

    while True:
        try:
            await trio.lowlevel.wait_readable(STDIN)
        except PermissionError:  # epoll(7) takes no regular files: these are always readable
            await trio.lowlevel.checkpoint()
        try:
            return os.read(STDIN, CHUNK)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that hung up, or has us in the background
                raise SandboxError(f"stdin: {error.strerror}") from None
            return b""


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Every key goes to the job as it is; the terminal is as before in every ending."""
    import termios
    import tty

    try:
        before = termios.tcgetattr(STDIN)
    except termios.error:  # no terminal: a pipe feeds it
        yield
        return
    try:
        tty.setraw(STDIN, termios.TCSANOW)
        yield
    finally:
        # From the background this would stop us instead (tcsetattr(3)).
        stopping = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(STDIN, termios.TCSANOW, before)
        signal.signal(signal.SIGTTOU, stopping)
