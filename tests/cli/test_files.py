"""`sandboxd run` with files in and artifacts out."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sandboxd.cli import inputs

pytestmark = pytest.mark.needs("userns")


def packed(mode: str = "w", **files: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            one = tarfile.TarInfo(name)
            one.size = len(data)
            archive.addfile(one, io.BytesIO(data))
    return made.getvalue()


def sandboxd(*words: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-m", "sandboxd", "run", *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=50)


SHOW = ("--", "sh", "-c", "grep -r . . | sort")


def test_archives_and_files_over_them(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed(a=b"archive", b=b"archive"))
    (tmp_path / "file").write_bytes(b"file")
    given = ("--files-from", tmp_path / "a.tar", "--files-from", "-", "--files-from=-:sub/c")
    done = sandboxd("-q", *given, *SHOW)
    assert done.returncode == 125
    assert b"stands there twice" in done.stderr
    stdin = packed("w:gz", a=b"stdin")
    done = sandboxd(
        "-q", "--files-from=-:sub/c", *given[:2], "--file", f"{tmp_path}/file:b", *SHOW, stdin=stdin
    )
    assert done.stdout.splitlines() == [b"./a:archive", b"./b:file", b"./sub/c/a:stdin"]
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_no_archive(tmp_path: Path) -> None:
    for words, stdin, said in (
        (("--files-from", "-"), b"nonsense" * 100, b"no tar archive"),
        (("--files-from", "-"), b"", b"truncated"),
        (("--files-from", "-", "-i"), b"", b"both read stdin"),
        (("--files-from", tmp_path / "none.tar"), b"", b"none.tar: No such file"),
    ):
        done = sandboxd(*words, "--", "true", stdin=stdin)
        assert done.returncode == 125, words
        assert said in done.stderr
    for text in ("", ":", ":x", "a:", "a:/x", "a:../x"):
        assert sandboxd("--files-from", text, "--", "true").returncode == 2, text
    assert inputs.archive("a:b:c") == ("a:b", "c")


LEAVE = "cd out; printf x > $(printf '\\377'); echo 1 > a; ln -s a l; head -c 3000000 /dev/zero > z"


def test_artifacts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--collect", "out/*", "--collect-optional", "core", "--collect-required", "*.png")
    done = sandboxd("--json", *words, "--collect-to", out, "--collect-bytes", "1M",
                    "--", "sh", "-c", f"mkdir out; {LEAVE}")  # fmt: skip
    record = json.loads(done.stdout)
    assert (done.returncode, record["status"]) == (1, "artifact_error")
    assert {one["path"]: one["reason"] for one in record["artifact_errors"]} == {
        "out/l": "is a symbolic link",
        "out/z": "has 3000000 bytes, and 1048574 of 1048576 bytes are left",
        "*.png": "nothing matches",
    }
    assert [one["path"] for one in record["artifacts"]] == ["out/a", "out/\\xff"]
    name = base64.b64decode(record["artifacts"][1]["path_b64"])
    assert sorted(os.listdir(os.fsencode(out / "out"))) == [b"a", b"\xff"]
    assert name == b"out/\xff"
    done = sandboxd("-q", "--collect", "z", "--collect-files", "unlimited", "--collect-to", out,
                    "--", "sh", "-c", "head -c 3000000 /dev/zero > z")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert (out / "z").stat().st_size == 3_000_000
