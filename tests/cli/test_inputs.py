"""Collected files are written where they belong, whatever the job called them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from sandboxd.cli.inputs import save
from sandboxd.errors import JobError
from sandboxd.result import Artifact


def artifact(path: str, data: bytes = b"new", mode: int = 0o644) -> Artifact:
    digest = hashlib.sha256(data).hexdigest()
    return Artifact(path=path, bytes=len(data), sha256=digest, mode=mode, data=data)


def test_names_and_modes(tmp_path: Path) -> None:
    top = tmp_path / "a/b"
    every = [artifact("x", mode=0o6755), artifact("d/e/f", b"deep"), artifact("d/\udcff\n")]
    save(every, top)
    assert (top / "x").stat().st_mode & 0o7777 == 0o755
    assert (top / "d/e/f").read_bytes() == b"deep"
    assert os.path.exists(os.fsencode(top) + b"/d/\xff\n")
    save([artifact("x", b"")], top)
    assert (top / "x").read_bytes() == b""


@pytest.mark.parametrize("path", ["", ".", "..", "/etc/x", "a/../../x", "a//b", "a/", "./a"])
def test_names_that_lead_elsewhere(tmp_path: Path, path: str) -> None:
    with pytest.raises(JobError, match="is no name of a file"):
        save([artifact(path)], tmp_path / "top")
    assert os.listdir(tmp_path) == ["top"]


def test_no_link_is_followed(tmp_path: Path) -> None:
    top, outside = tmp_path / "top", tmp_path / "outside"
    top.mkdir()
    outside.mkdir()
    (outside / "f").write_text("old")
    (top / "folder").symlink_to(outside)
    (top / "file").symlink_to(outside / "f")
    for path in ("folder/f", "folder/new", "file"):
        with pytest.raises(JobError, match=f"--collect-to {top}/{path}: "):
            save([artifact(path)], top)
    assert (outside / "f").read_text() == "old"
    assert os.listdir(outside) == ["f"]


def test_what_is_no_file_is_not_written_to(tmp_path: Path) -> None:
    """A pipe in the way would block us for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in ("pipe", "folder", "pipe/x"):
        with pytest.raises(JobError, match="--collect-to"):
            save([artifact(path)], tmp_path)


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"--collect-to .*/file: File exists"):
        save([artifact("x")], tmp_path / "file")
