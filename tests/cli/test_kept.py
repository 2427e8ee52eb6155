"""`run --keep` and `--commit`, `diff`, `commit` and `kept`: what they print, and how they end."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.images.importing import import_image
from tests.images import making
from tests.images.making import SMALL, ids, oci_layout, tarball

pytestmark = pytest.mark.needs("userns", "overlay")
WRITABLE = ("--image", "made", "--writable-root", "-u", "caller")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SANDBOXD_IMAGES", str(tmp_path / "store"))
    monkeypatch.setenv("SANDBOXD_KEPT", str(tmp_path / "kept"))
    with making.store(tmp_path / "store") as found:
        top = oci_layout(tmp_path / "layout", [tarball(making.system(tmp_path / "system"))],
                         {"Env": ["PATH=/usr/bin"]})  # fmt: skip
        import_image(found, str(top), None, ids(), dataclasses.replace(SMALL, entries=9999))
        yield


def sandboxd(*words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-P", "-m", "sandboxd", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def run(*words: str) -> tuple[int, str, str]:
    return sandboxd("run", *WRITABLE, *words)


def test_from_a_run_to_an_image() -> None:
    script = "echo hello > /srv/new; rm /etc/passwd"
    status, _, said = run("--keep", "--name", "setup", "--", "sh", "-c", script)
    assert status == 0, said
    assert "sandboxd: kept: setup (2 changed, 1 deleted, 1 added)\n" in said
    assert sandboxd("diff", "setup") == (0, "C /etc\nD /etc/passwd\nC /srv\nA /srv/new\n", "")
    status, out, _ = sandboxd("diff", "--json", "setup")
    record = json.loads(out)
    assert record["schema"] == "sandboxd.kept/1"
    assert record["changes"][0] == {"kind": "C", "path": "/etc"}
    assert (record["name"], record["image"], record["status"]) == ("setup", "made", "ok")
    assert Path(record["layer"]).is_file()
    status, out, said = sandboxd("commit", "setup", "made:new")
    assert (status, said) == (0, "")
    assert out.startswith("made:new  ")
    assert "2 layers (1 new)" in out
    status, out, _ = sandboxd("run", "-q", "--image", "made:new", "--", "cat", "/srv/new")
    assert (status, out) == (0, "hello\n")
    status, out, _ = sandboxd("kept", "ls")
    assert out.startswith("setup  ok  made  A1 C2 D1  ")
    assert json.loads(sandboxd("kept", "ls", "--json")[1])["kept"][0]["name"] == "setup"
    assert sandboxd("kept", "rm", "setup") == (0, "setup\n", "")
    assert sandboxd("kept", "ls") == (0, "", "")
    assert sandboxd("diff", "setup")[0] == 1


def test_all_at_once() -> None:
    status, out, said = run("--commit", "at:once", "--json", "--", "sh", "-c", "echo x > /srv/new")
    assert (status, json.loads(out)["status"]) == (0, "ok")
    assert json.loads(out)["kept"]["counts"] == {"changed": 1, "added": 1}
    assert "committed: at:once " in said
    assert sandboxd("kept", "ls") == (0, "", "")
    assert sandboxd("run", "-q", "--image", "at:once", "--", "cat", "/srv/new")[1] == "x\n"


def test_only_what_ended_well_is_committed() -> None:
    status, _, said = run("--commit", "never", "--", "sh", "-c", "echo x > /srv/new; exit 3")
    assert (status, "not committed: nonzero_exit" in said) == (3, True)
    assert "never" not in sandboxd("image", "ls")[1]
    assert sandboxd("kept", "ls") == (0, "", "")


def test_what_is_refused_before_it_runs() -> None:
    status, _, said = sandboxd("run", "--keep", "--image", "made", "--", "true")
    assert (status, "read-only" in said, "--writable-root" in said) == (125, True, True)
    assert run("--keep", "--name", "twice", "--", "true")[0] == 0
    status, out, said = run("--keep", "--name", "twice", "--", "sh", "-c", "echo ran")
    assert (status, out, "kept rm twice" in said) == (125, "", True)
    status, _, said = sandboxd("run", "--commit", "x", "--writable-root", "--", "true")
    assert (status, "--image NAME" in said) == (125, True)
    assert run("--commit", "not a name", "--", "true")[0] == 125
    status, _, said = sandboxd("commit", "nothing", "x")
    assert (status, "no kept root 'nothing'" in said) == (1, True)
