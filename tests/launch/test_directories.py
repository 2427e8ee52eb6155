"""Directories that a hostile program filled: removed whole, measured as far as was asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandboxd.launch.measure import DEEPEST, measure
from sandboxd.launch.removal import empty


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    found = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield found
    finally:
        os.close(found)


def deep(folder: Path, levels: int) -> None:
    """Directories within one another, deeper than a path can be long."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d" * 100, dir_fd=here)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def fill(folder: Path, outside: Path) -> None:
    (folder / "a/b/c").mkdir(parents=True)
    for name in (b"\xff\xfe", b"new\nline", b"-rf"):
        (folder / "a" / os.fsdecode(name)).write_bytes(b"x" * 5000)
    (folder / "out").symlink_to(outside)
    (folder / "a/out").symlink_to(outside / "kept")
    os.mkfifo(folder / "a/fifo")
    os.link(folder / "a/-rf", folder / "a/b/again")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    found = tmp_path / "outside"
    found.mkdir()
    (found / "kept").write_bytes(b"y" * 1000000)
    return found


def test_everything_goes_and_nothing_else(tmp_path: Path, outside: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    fill(top, outside)
    deep(top / "a/b", 3000)
    for number in range(300):  # wide as well: each is looked into once
        (top / f"wide/{number}/x").mkdir(parents=True)
    with opened(top) as folder:
        before = len(os.listdir("/proc/self/fd"))
        empty(folder)
        assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(top) == []
    assert os.listdir(outside) == ["kept"]


def test_what_there_is(tmp_path: Path, outside: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    fill(top, outside)
    with opened(top) as folder:
        found = measure(folder, 1000)
        assert (found.entries, found.whole) == (9, True)  # one file has two names
        files = sum((top / "a" / name).lstat().st_blocks for name in os.listdir(top / "a"))
        assert found.bytes >= 512 * files - 4096
        assert found.bytes < 500000
        less = measure(folder, 5)
        assert (less.entries, less.whole) == (5, False)


def test_deeper_than_is_looked_at(tmp_path: Path) -> None:
    deep(tmp_path, DEEPEST + 10)
    with opened(tmp_path) as folder:
        before = len(os.listdir("/proc/self/fd"))
        found = measure(folder, 1000)
        assert not found.whole
        assert found.entries == DEEPEST
        assert len(os.listdir("/proc/self/fd")) == before
        empty(folder)


def test_a_hole_takes_no_room(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with opened(tmp_path) as folder:
        assert measure(folder, 10).bytes < 65536
