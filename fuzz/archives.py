"""Whatever an archive among a job's files has, all that comes of it lies below its place.

Or JobError is raised and nothing else. No descriptor is left open, nothing is longer than there is
room for, and the order is one in which it can be made: directories last.

    ./do fuzz archives          # until stopped by an error, or after a million examples
    ./do fuzz archives 5000     # that many examples
"""

from __future__ import annotations

import gzip
import os
import sys
import tempfile
from pathlib import Path

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.tar import archives
from sandboxd.errors import JobError
from sandboxd.job import Tar
from sandboxd.linux import packets
from sandboxd.supervise.archives import Room
from sandboxd.supervise.sources import items

ROOM = Room(bytes=1 << 20, files=1000)
PLACES = ["t", ".", "a/b"]


def check(source: bytes | Path, place: str) -> None:
    top = b"" if place == "." else os.fsencode(place) + b"/"
    folders = False
    made = items({place: Tar(source)}, ROOM)
    try:
        for entry, descriptor in made:
            try:
                holds(entry, top, descriptor)
            finally:
                if descriptor is not None:
                    os.close(descriptor)
            assert not folders or entry.kind == packets.DIRECTORY
            folders = entry.kind == packets.DIRECTORY
    except JobError:
        return
    finally:
        made.close()


def holds(entry: packets.Entry, top: bytes, descriptor: int | None) -> None:
    assert (entry.name + b"/").startswith(top)
    assert entry.name
    assert not {b"", b".", b".."} & set(entry.name.split(b"/"))
    assert entry.mode <= 0o777
    assert (descriptor is not None) == (entry.kind == packets.SOURCE)
    if entry.kind == packets.HARDLINK:
        assert entry.content.startswith(top)
        assert not {b"", b".", b".."} & set(entry.content.split(b"/"))
    elif entry.kind == packets.SOURCE and entry.content:
        _, length = packets.RANGE.unpack(entry.content)
        assert ROOM.bytes is not None
        assert length <= ROOM.bytes
    else:
        assert len(entry.content) <= packets.INLINE


def fuzz(examples: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "archive")

        @settings(
            max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck),
            database=None,
        )  # fmt: skip
        @given(archives, st.sampled_from(PLACES), st.sampled_from(["bytes", "gzip", "path"]))
        def whatever(data: bytes, place: str, kind: str) -> None:
            source: bytes | Path = gzip.compress(data, 0) if kind == "gzip" else data
            if kind == "path":
                file.write_bytes(data)
                source = file
            check(source, place)
            assert len(os.listdir("/proc/self/fd")) == before

        whatever()


async def main() -> None:
    """In a thread of trio's, as in a run: it may be asked whether the run was cancelled."""
    await trio.to_thread.run_sync(fuzz, int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)


if __name__ == "__main__":
    trio.run(main)
