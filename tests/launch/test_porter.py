"""The porter alone: whatever it is sent, it answers or ends, and it ends with its socket."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import sandboxd
from sandboxd.linux import packets
from sandboxd.script.command import porter_command

ROOT = str(Path(sandboxd.__file__).parents[1])
PATIENCE = 20.0


@contextmanager
def running(namespace: int = -1) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.settimeout(PATIENCE)
        with theirs:
            process = subprocess.Popen(
                porter_command(ROOT, theirs.fileno(), namespace),
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(), *([namespace] if namespace >= 0 else [])),
            )
        with process:
            try:
                yield process, ours
            finally:
                process.kill()


def alive(link: socket.socket, folder: Path) -> bool:
    box = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        packets.send(link, struct.pack("<c5Q", b"O", 1, 1, 1, 1, 1), [box])
    finally:
        os.close(box)
    return packets.receive(link) == (b"d", [])


def test_it_ends_with_its_socket(tmp_path: Path) -> None:
    with running() as (process, link):
        assert alive(link, tmp_path)
        link.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_it_ends_when_nobody_wants_the_answer(tmp_path: Path) -> None:
    with running() as (process, link):
        packets.send(link, b"?", [])
        link.close()
        assert process.wait(PATIENCE) == 0


def test_it_keeps_nothing_open(tmp_path: Path) -> None:
    with running() as (process, link):
        for _ in range(10):
            assert alive(link, tmp_path)
            assert len(descriptors(process)) == 4  # standard ones, and the socket


def descriptors(process: subprocess.Popen[bytes]) -> list[str]:
    return os.listdir(f"/proc/{process.pid}/fd")


def requests() -> list[bytes]:
    """No requests: nonsense, requests cut short, lengths that lie."""
    chance = random.Random(1)
    entry = packets._ENTRY.pack(1, 0o644, 1, 3, packets.NOW) + b"nabc"
    good = struct.pack("<cII", b"I", 0, 0) + entry
    lies = [
        struct.pack("<cII", b"I", 0, 0) + packets._ENTRY.pack(kind, 0, 2**32 - 1, 2**32 - 1, 0)
        for kind in range(8)
    ]
    return [
        *(good[:length] for length in range(1, len(good) - len(entry))),
        *lies,
        *(chance.randbytes(chance.randrange(1, 200)) for _ in range(200)),
        struct.pack("<cII", b"I", 0, 0) + packets._ENTRY.pack(2, 0, 1, 0, 0) + b"n",
        struct.pack("<c5Q", b"O", 0, 0, 0, 0, 0) + packets._ENTRY.pack(5, 0, 0, 0, 0),
        bytes(65536),
    ]


@pytest.mark.parametrize("with_box", [False, True])
def test_what_is_no_request_is_answered_all_the_same(tmp_path: Path, with_box: bool) -> None:
    box = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with running() as (process, link):
            for request in requests():
                packets.send(link, request, [box] if with_box else [])
                content, received = packets.receive(link)
                packets.close(received)
                assert content[:1] in (b"f", b"d"), request
            os.fchmod(box, 0o700)  # some did name the directory itself
            assert alive(link, tmp_path)
            assert len(descriptors(process)) == 4
    finally:
        os.close(box)


def test_a_namespace_that_is_none_is_said_before_it_ends(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file, running(file.fileno()) as (process, link):
        content, _ = packets.receive(link)
        assert process.wait(PATIENCE) == 1
    (entry,) = packets.entries(content, 1)
    assert content[:1] == b"f"
    assert entry.name == b"join the user namespace of the tenant"
    assert os.strerror(entry.mode) == "Invalid argument"
