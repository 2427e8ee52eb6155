"""`sandboxd top`: once into a file, live on a terminal, and what strangers write obeys nothing."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from sandboxd.cli import top
from tests.serve.serving import ROOT, Process, folder, process

pytestmark = pytest.mark.needs("userns")

HOSTILE = "\x1b]0;title\x07\x1b[2J\u202e\n'"


@pytest.fixture
def served() -> Iterator[Process]:
    with folder() as place, process(place) as one:
        links = trio.run(one.links)
        trio.run(links.close)
        yield one


def environ(served: Process) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    return found | {"SANDBOXD_HOST": f"unix://{served.place}/s"}


def sandboxd(served: Process, *argv: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-m", "sandboxd", *argv]
    return subprocess.run(
        command, env=environ(served), capture_output=True, timeout=50, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def look(served: Process) -> dict[str, Any]:
    return dict(json.loads(sandboxd(served, "top", "--json").stdout))


def test_one_look(served: Process) -> None:
    sandboxd(served, "submit", "--name", "busy", "--", "sh", "-c", "sleep 60", HOSTILE)
    sandboxd(served, "submit", "--name", "failed", "--", "sh", "-c", "exit 7")
    assert sandboxd(served, "wait", "-q", "failed").returncode == 7
    while not look(served)["jobs"]:
        time.sleep(0.01)
    done = sandboxd(served, "top")
    assert done.returncode == 0
    shown = done.stdout.decode()
    assert re.search(r"^sandboxd \S+: 1 running, 0 waiting; 2 slots", shown)
    assert re.search(r"^busy .* sh -c 'sleep 60' ", shown, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d +failed .* nonzero_exit ", shown, re.MULTILINE)
    assert all(char.isprintable() or char == "\n" for char in shown)


def test_what_cannot_be(served: Process) -> None:
    done = sandboxd(served, "top", "--every", "1ms")
    assert (done.returncode, b"--every" in done.stderr) == (1, True)
    done = sandboxd(served, "top", "--host", f"unix://{served.place}/none")
    assert b"no daemon at" in done.stderr


class Terminal:
    """A terminal in which something runs."""

    def __init__(self, ours: int, process: subprocess.Popen[bytes]) -> None:
        self.ours = ours
        self.process = process
        self.shown = ""

    def until(self, pattern: str) -> str:
        """What is shown, once there is this in it; and from then on only what is new."""
        deadline = time.monotonic() + 50
        while not re.search(pattern, self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.ours], [], [], 1)[0]:
                self.shown += os.read(self.ours, 65536).decode(errors="replace")
        found, self.shown = self.shown, ""
        return found

    def size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)


@contextmanager
def terminal(served: Process) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
    command = [sys.executable, "-P", "-m", "sandboxd", "top", "--every", "200ms"]
    started = subprocess.Popen(
        command, env=environ(served), stdin=theirs, stdout=theirs, stderr=theirs
    )
    before = termios.tcgetattr(theirs)
    try:
        yield Terminal(ours, started)
        if started.poll() is not None:
            assert termios.tcgetattr(theirs) == before  # as it was
    finally:
        os.close(theirs)
        os.close(ours)
        if started.poll() is None:
            started.kill()
        started.wait()


def test_live_on_a_terminal(served: Process) -> None:
    with terminal(served) as shown:
        first = shown.until(r"0 running")
        assert first.startswith("\x1b[?1049h\x1b[?25l")
        busy = ("sh", "-c", "while :; do :; done", HOSTILE)
        sandboxd(served, "submit", "--name", "busy", "--", *busy)
        screen = shown.until(r"busy .* [1-9]\d* % ")
        assert re.search(r"[1-9]\d* % ", screen)
        assert "\u202e" not in screen
        assert "]0;title\x07" not in screen
        sandboxd(served, "cancel", "busy")
        shown.until(r"busy .* cancelled ")
        os.write(shown.ours, b"q")
        assert shown.process.wait(50) == 0
        assert shown.until(r"1049l").endswith("\x1b[?25h\x1b[?1049l")


def test_it_follows_the_size_of_the_terminal(served: Process) -> None:
    with terminal(served) as shown:
        shown.until("callers")
        shown.size(2, 20)
        narrow = shown.until(r"and \d+ lines more")
        last = narrow.rpartition("\x1b[H")[2]
        rows = [re.sub(r"\x1b\[\d*[a-zA-Z]", "", row) for row in last.split("\r\n")]
        assert len(rows) == 2
        assert all(len(row) < 20 for row in rows), rows


def test_a_signal_leaves_the_terminal_as_it_was(served: Process) -> None:
    with terminal(served) as shown:
        shown.until("callers")
        shown.process.send_signal(signal.SIGTERM)
        assert shown.process.wait(50) == 0
        shown.until(r"1049l")


def test_the_daemon_may_go_and_come_back(served: Process) -> None:
    with terminal(served) as shown:
        shown.until("callers")
        served.kill(signal.SIGTERM)
        shown.until("asking again")
        served.start()
        screen = shown.until(r"\x1b\[H\x1b\[1msandboxd ")
        assert screen
        os.write(shown.ours, b"q")
        assert shown.process.wait(50) == 0


def test_numbers_are_for_people() -> None:
    assert [top._size(one) for one in (None, 0, 1023, 1 << 20, 3 << 30)] == [
        "", "0 B", "1023 B", "1.0 MiB", "3.0 GiB",
    ]  # fmt: skip
    assert [top._seconds(one) for one in (None, 1.25, 600.0)] == ["", "1.2 s", "10.0 min"]
