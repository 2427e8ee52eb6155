"""What is between the caller and a run in the foreground: signals, pipes, a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.cli.test_run import PATIENCE, RUN, shell

pytestmark = [pytest.mark.needs("userns"), pytest.mark.root_ok]

MARK = "86399.125"
"""What `sleep` in a sandbox is told, so that one of ours can be found on the whole machine."""


def asleep() -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[:2] == [b"sleep", MARK.encode()]:
                found.append(pid)
    return found


@contextlib.contextmanager
def started(*words: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a session of its own, as a shell's job would be; it does not outlive a failure."""
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    usual = {"stdin": nothing, "stdout": pipe, "stderr": pipe, "start_new_session": True}
    opened: Any = subprocess.Popen([*RUN, *words], **usual | options)
    with opened as process:
        try:
            yield process
            process.wait(timeout=PATIENCE)
        finally:
            process.kill()


def wait_asleep(count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(asleep()) != count:
        assert time.monotonic() < deadline, asleep()
        time.sleep(0.01)


def line(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    return stream.readline()


# -- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)],
)
def test_a_signal_leaves_nothing(number: signal.Signals, code: int) -> None:
    """To the whole process group, as a terminal sends it."""
    script = f"trap '' INT TERM HUP QUIT; sleep {MARK} & setsid sleep {MARK} & echo ready; wait"
    with started(*shell(script)) as process:
        assert line(process.stdout) == b"ready\n"
        wait_asleep(2)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (code, b""), err
    assert err.startswith(b"sandboxd: cancelled (")
    assert b"Traceback" not in err
    assert asleep() == []


def test_a_signal_before_it_has_begun() -> None:
    for pause in (0.05, 0.1, 0.2, 0.3, 0.4):
        with started("--", "sleep", MARK) as process:
            time.sleep(pause)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode in (143, -signal.SIGTERM)
        assert b"Traceback" not in err
        assert asleep() == []


def test_a_signal_while_nobody_reads() -> None:
    """The pipe is full and the run stalls; that must not keep the signal from us."""
    with started("--", "yes") as process:
        assert line(process.stdout) == b"y\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 143


def test_a_limit_while_nobody_reads() -> None:
    with started("--json=stream", "--wall-time", "500ms", "--", "yes") as process:
        assert b"start" in line(process.stdout)
        time.sleep(1.5)
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 124
    assert json.loads(out.splitlines()[-1])["result"]["status"] == "wall_time_limit"


def test_two_signals() -> None:
    with started("--", "sleep", MARK) as process:
        time.sleep(0.4)
        for _ in range(5):
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
    assert process.returncode in (130, -signal.SIGINT)
    assert asleep() == []


def test_a_cancelled_run_has_a_result() -> None:
    with started("--json", "--", "sleep", MARK) as process:
        wait_asleep(1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert json.loads(out)["status"] == "cancelled"


def test_nohup() -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with started("-q", *shell("echo ready; sleep 1; echo done"), preexec_fn=ignore) as process:
        assert line(process.stdout) == b"ready\n"
        process.send_signal(signal.SIGHUP)
        assert line(process.stdout) == b"done\n"
    assert process.returncode == 0


def test_we_are_killed() -> None:
    """SIGKILL: nothing of ours runs any more, and still no process stays."""
    with started(*shell(f"echo ready; sleep {MARK}")) as process:
        assert line(process.stdout) == b"ready\n"
        process.kill()
        process.wait(timeout=PATIENCE)
    wait_asleep(0)
    with started("-q", "--", "true"):
        pass  # whoever runs next removes the empty cgroup that stayed


# -- readers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--", "yes"), ("--json=stream", "--", "yes")])
def test_a_reader_who_goes_away_ends_it(words: tuple[str, ...]) -> None:
    """As in `sandboxd run -- yes | head -1`."""
    with started(*words) as process:
        assert line(process.stdout)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) == 141
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def test_a_reader_of_stderr_who_goes_away() -> None:
    with started(*shell(f"while :; do echo x >&2; sleep 0.01; done & sleep {MARK}")) as process:
        assert line(process.stderr) == b"x\n"
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(timeout=PATIENCE) == 141
    assert asleep() == []


def test_a_slow_reader_stalls_the_program() -> None:
    script = "i=0; while [ $i -lt 200 ]; do head -c 65536 /dev/zero; i=$((i+1)); done; echo >&2 end"
    with started("-q", *shell(script)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"\0"
        assert not select.select([process.stderr], [], [], 1.0)[0]
        assert len(process.stdout.read()) == 200 * 65536 - 1
        assert process.stderr.read() == b"end\n"


# -- a terminal ------------------------------------------------------------------------------


class Screen:
    """The master of a terminal: what we type and see."""

    def __init__(self, master: int, slave: int) -> None:
        self.master, self.slave = master, slave
        self.seen = b""

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def wait_for(self, text: bytes) -> None:
        self.wait_until(lambda: text in self.seen, text)

    def wait_until(self, reached: Callable[[], bool], what: object) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline, (what, self.seen)
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def settings(self) -> list[Any]:
        return termios.tcgetattr(self.slave)


@pytest.fixture
def screen() -> Iterator[Screen]:
    master, slave = pty.openpty()
    try:
        yield Screen(master, slave)
    finally:
        os.close(master)
        os.close(slave)


def on(screen: Screen, *words: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """A run whose terminal it is."""

    def take() -> None:
        fcntl.ioctl(screen.slave, termios.TIOCSCTTY, 0)

    end = screen.slave
    return started(*words, stdin=end, stdout=end, stderr=end, preexec_fn=take)


def test_a_terminal_and_its_size(screen: Screen) -> None:
    before = screen.settings()
    screen.resize(33, 111)
    script = """
test -t 0 && test -t 1 && test -t 2 && stty size
while [ "$(stty size)" = "33 111" ]; do sleep 0.01; done
stty size
read x
echo got $x
"""
    with on(screen, "-itq", *shell(script)) as process:
        screen.wait_for(b"33 111")
        assert screen.settings() != before  # raw: the job's own terminal echoes
        screen.resize(44, 122)
        screen.wait_for(b"44 122")
        screen.type(b"abc\r")
        screen.wait_for(b"got abc\r\n")
        assert process.wait(timeout=PATIENCE) == 0
    assert screen.seen.count(b"abc") == 2  # echoed once
    assert screen.settings() == before


def test_ctrl_c_goes_to_the_program(screen: Screen) -> None:
    before = screen.settings()
    script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"
    with on(screen, "-it", *shell(script)) as process:
        screen.wait_for(b"ready")
        screen.type(b"\x03")
        screen.wait_for(b"caught")
        screen.wait_for(b"sandboxd: nonzero_exit 5")
        assert process.wait(timeout=PATIENCE) == 5
    assert screen.settings() == before


def test_end_of_input_in_a_terminal(screen: Screen) -> None:
    with on(screen, "-itq", "--", "cat") as process:
        screen.type(b"line\r")
        screen.wait_for(b"line\r\nline\r\n")
        screen.type(b"\x04")
        assert process.wait(timeout=PATIENCE) == 0


def test_ctrl_c_without_a_terminal_of_its_own(screen: Screen) -> None:
    with on(screen, *shell(f"echo ready; sleep {MARK}")) as process:
        screen.wait_for(b"ready")
        screen.type(b"\x03")
        assert process.wait(timeout=PATIENCE) == 130
    assert asleep() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_puts_the_terminal_back(screen: Screen, number: signal.Signals) -> None:
    before = screen.settings()
    with on(screen, "-it", *shell(f"echo ready; sleep {MARK}")) as process:
        screen.wait_for(b"ready")
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == 128 + number
    assert screen.settings() == before
    assert asleep() == []


def test_a_failure_leaves_the_terminal_alone(screen: Screen) -> None:
    before = screen.settings()
    with on(screen, "-it", "--", "no-such-program") as process:
        assert process.wait(timeout=PATIENCE) == 127
    assert screen.settings() == before


def test_a_terminal_fed_by_a_pipe() -> None:
    words = [*RUN, "-itq", "--", "cat"]
    done = subprocess.run(
        words, input=b"in a pipe", capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0
    assert done.stdout.count(b"in a pipe") == 2  # echoed, and from cat


def test_a_terminal_nobody_types_in() -> None:
    done = subprocess.run(
        [*RUN, "-tq", *shell("test -t 1 && stty size")],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"24 80\r\n")


def test_the_accounting_begins_on_a_line_of_its_own(screen: Screen) -> None:
    with on(screen, *shell("printf unfinished")) as process:
        screen.wait_for(b"unfinished\r\nsandboxd: ok")
        assert process.wait(timeout=PATIENCE) == 0
