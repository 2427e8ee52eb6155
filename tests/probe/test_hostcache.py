"""The cache is used, and whatever is wrong with it, or with its place, does no harm."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import msgspec
import pytest

from sandboxd.cgroup.ladder import climbed
from sandboxd.probe import hostcache
from sandboxd.probe.attempts import Outcome, Tools
from sandboxd.probe.host import examine, probe

pytestmark = pytest.mark.root_ok


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; where its file will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/sandboxd/host.json"


def claim(path: Path, why: str) -> None:
    """Make the cache say, under its own key, that overlays do not work."""
    kept = json.loads(path.read_text())
    kept["outcomes"]["overlay"] = msgspec.structs.asdict(Outcome(why=why))
    path.write_text(json.dumps(kept))


def believed() -> bool:
    """Whether the next probe takes what claim() wrote from the cache."""
    return probe().fault_notes.get("overlay", "").startswith("made up")


@pytest.fixture
def claimed(cache: Path) -> Path:
    probe()
    if not cache.exists():
        pytest.skip("a failure of this host may pass, so nothing is kept")
    claim(cache, "made up")
    return cache


def test_the_cache_is_used(claimed: Path) -> None:
    assert believed()
    assert stat.S_IMODE(claimed.stat().st_mode) == 0o600
    assert stat.S_IMODE(claimed.parent.stat().st_mode) == 0o700
    assert os.listdir(claimed.parent) == ["host.json"]


def test_a_fresh_probe_corrects_the_cache(claimed: Path) -> None:
    fresh = probe(cached=False)
    assert probe() == fresh
    assert not believed()


@pytest.mark.parametrize(
    "content", [b"", b"\0\xff", b"{}", b"[[[[", b'{"key": {}, "outcomes": {}}', b"9" * 5000]
)
def test_a_corrupt_cache_is_ignored(claimed: Path, content: bytes) -> None:
    claimed.write_bytes(content)
    before = probe()
    assert not believed()
    assert probe() == before
    assert json.loads(claimed.read_text())["outcomes"]


def test_outcomes_that_are_none(claimed: Path) -> None:
    kept = json.loads(claimed.read_text())
    kept["outcomes"]["overlay"] = {"found": True}
    claimed.write_text(json.dumps(kept))
    with climbed("none") as climb:
        assert examine(climb).outcomes["user_namespace"] != Outcome(why="made up")
    assert not believed()


@pytest.mark.parametrize("part", ["boot", "kernel", "who", "/etc/subuid", "user", "sandboxd"])
def test_a_stale_cache_is_ignored(claimed: Path, part: str) -> None:
    kept = json.loads(claimed.read_text())
    assert part in kept["key"]
    kept["key"][part] = "another"
    claimed.write_text(json.dumps(kept))
    assert not believed()


def test_another_tool_is_another_key(tmp_path: Path) -> None:
    tool = tmp_path / "fuse-overlayfs"
    tool.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    tool.chmod(0o755)
    found = msgspec.structs.replace(Tools.in_path(), fuse_overlayfs=str(tool))
    first = hostcache.key(found, None)
    os.utime(tool, ns=(1, 1))
    assert hostcache.key(found, None) != first


def test_a_cache_that_others_can_write_is_ignored(claimed: Path) -> None:
    claimed.chmod(0o666)
    assert not believed()


def test_a_cache_behind_a_link_is_ignored(claimed: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    claimed.rename(elsewhere)
    claimed.symlink_to(elsewhere)
    assert not believed()
    assert not claimed.is_symlink()  # the new one took its place
    assert "made up" in elsewhere.read_text()


@pytest.mark.needs("subuid")
def test_a_cache_of_somebody_else_is_ignored(claimed: Path) -> None:
    claimed.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(claimed, 12345, 12345)
    else:
        argv = ["unshare", "--map-root-user", "--map-auto", "chown", "1:1", str(claimed)]
        subprocess.run(argv, check=True)
    assert claimed.stat().st_uid != os.geteuid()
    assert not believed()


def test_a_cache_that_is_a_pipe_does_not_block(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    os.mkfifo(cache)
    assert probe().kernel


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null"])
def test_a_place_that_cannot_be_written(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    assert probe() == probe()


def test_no_home_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "relative")
    assert hostcache.folder() is None
    assert probe().kernel


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a directory of somebody else")
def test_root_leaves_nothing_in_the_home_of_others(cache: Path) -> None:
    cache.parent.parent.mkdir()
    os.chown(cache.parent.parent, 12345, 12345)
    probe()
    assert not cache.parent.exists()
