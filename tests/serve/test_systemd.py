"""Sockets that we are started with, and notes to who started us."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sandboxd.serve import systemd
from tests.serve.serving import ROOT, folder

# What systemd does: the socket is descriptor 3, and the variables name this very process.
STARTER = """\
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="x")
os.execv(sys.executable, [sys.executable, "-P", "-m", "sandboxd", "serve", *sys.argv[2:]])
"""


def test_sockets_are_only_taken_by_whom_they_are_for() -> None:
    for environ in (
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"},
        {"LISTEN_PID": str(os.getpid())},
    ):
        assert systemd.activated(environ) == []
        assert not environ


@pytest.mark.parametrize("what", ["a file", "nothing", "a socket that is connected"])
def test_what_is_no_socket_that_listens_is_said(what: str) -> None:
    pair = socket.socketpair()
    given = {"a file": 1, "nothing": 99, "a socket that is connected": pair[0].fileno()}[what]
    script = STARTER.replace("os.dup2(int(sys.argv[1]), 3)", "_ = sys.argv[1] == '99' or "
                             "os.dup2(int(sys.argv[1]), 3)")  # fmt: skip
    with folder() as place, pair[0], pair[1]:
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, str(given), "--state", f"{place}/state"],
            cwd=ROOT, capture_output=True, text=True, timeout=50, check=False,
            pass_fds=[pair[0].fileno()],
        )  # fmt: skip
    assert done.returncode == 125
    assert "LISTEN_FDS: descriptor 3 is no socket that listens" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_note_goes_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"\0sandboxd-test-{os.getpid()}"
    for address in ("@" + name[1:], ""):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
            listening.bind(name)
            listening.setblocking(False)
            systemd.notify("READY=1")
            if address:
                assert listening.recv(100) == b"READY=1"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    systemd.notify("READY=1")


def test_started_by_a_connection() -> None:
    with folder() as place, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notes:
        notes.bind(str(place / "notes"))
        notes.settimeout(50)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(place / "s"))
            listening.listen()
            os.set_inheritable(listening.fileno(), True)
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.connect(str(place / "s"))  # before anybody is there to accept it
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            daemon = subprocess.Popen(
                [
                    *(sys.executable, "-c", STARTER, str(listening.fileno())),
                    *("--state", str(place / "state"), "--log-level", "warning"),
                ],
                cwd=ROOT,
                env={**os.environ, "NOTIFY_SOCKET": str(place / "notes")},
                pass_fds=[listening.fileno()],
            )
        try:
            with client:
                client.settimeout(50)
                answer = b"".join(iter(lambda: client.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert notes.recv(100) == b"READY=1"
        finally:
            daemon.send_signal(signal.SIGTERM)
            status = daemon.wait(50)
        assert notes.recv(100) == b"STOPPING=1"
        assert status == 0
        assert (place / "s").exists()  # it is systemd's, and stays
