"""`sandboxd volume`, and volumes and caches on the command line of `run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandboxd.cli.main import main

pytestmark = pytest.mark.needs("userns")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SANDBOXD_VOLUMES", str(tmp_path / "volumes"))
    monkeypatch.setenv("SANDBOXD_CACHES", str(tmp_path / "caches"))
    return tmp_path


def test_a_volume_from_its_making_to_its_end(
    capfd: pytest.CaptureFixture[str], place: Path
) -> None:
    assert main(["volume", "create", "data", "--size", "1M"]) == 0
    assert main(["volume", "create", "data"]) == 1
    said = capfd.readouterr()
    assert (said.out, said.err) == ("data\n", "sandboxd: volume data: there is one already\n")
    write = ["run", "-q", "-v", "data:/data", "--", "sh", "-c", "echo kept > /data/x"]
    assert main(write) == 0
    assert main(["run", "-q", "-v", "data:/d:ro", "--", "cat", "/d/x"]) == 0
    assert capfd.readouterr().out == "kept\n"
    assert main(["volume", "inspect", "data"]) == 0
    known = json.loads(capfd.readouterr().out)
    assert (known["kind"], known["size"], known["entries"]) == ("volume", 1 << 20, 1)
    assert Path(known["path"]) == place / "volumes/data/data"
    cached = ["--mount", "type=cache,source=c,target=/c", "--", "touch", "/c/x"]
    assert main(["run", "-q", *cached]) == 0
    assert main(["volume", "ls"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["volume", "data"], ["cache", "c"]]
    assert main(["volume", "ls", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["volumes"]) == 2
    assert main(["volume", "rm", "c"]) == 1
    assert "no volume 'c'" in capfd.readouterr().err
    assert main(["volume", "rm", "--cache", "c"]) == 0
    assert main(["volume", "rm", "data"]) == 0
    assert main(write) == 125
    assert "`sandboxd volume create data` makes it" in capfd.readouterr().err


def test_a_cache_that_others_have_is_busy(capfd: pytest.CaptureFixture[str], place: Path) -> None:
    import fcntl

    flag = ["--mount", "type=cache,source=c,target=/c,wait=1ms"]
    assert main(["run", "-q", *flag, "--", "true"]) == 0
    with (place / "caches/c/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert main(["run", "--json", *flag, "--", "true"]) == 125
    failure = json.loads(capfd.readouterr().out)
    assert failure["error"]["kind"] == "busy"
