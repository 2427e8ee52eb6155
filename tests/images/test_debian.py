"""An image of Debian packages, made here, and run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.errors import HostError, ImageError
from sandboxd.images import debian
from sandboxd.images.debian import Recipe
from sandboxd.images.store import Store
from sandboxd.images.unpacking import Limits
from tests.images import making
from tests.images.making import ids


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("SANDBOXD_IMAGES", str(tmp_path / "store"))
    with making.store(tmp_path / "store") as found:
        yield found


@pytest.mark.needs("mmdebstrap", "subuid", "packages")
def test_an_image_of_packages_runs(place: Store) -> None:
    words = [sys.executable, "-P", "-m", "sandboxd", "image"]
    build = [*words, "build-debian", "lab", "--variant=extract", "--include", "busybox-static"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lab ")
    run = [*words[:-1], "run", "-q", "--image", "lab", "--"]
    script = "echo from busybox; ls /etc/apt/apt.conf.d"
    busybox = [*run, "/bin/busybox", "sh", "-ec", script]
    done = subprocess.run(busybox, capture_output=True, text=True, check=False)
    assert done.stdout == "from busybox\n", done  # and none of this machine's proxies
    done = subprocess.run([*words, "verify"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.needs("mmdebstrap", "userns")
def test_what_cannot_be_built(place: Store) -> None:
    with pytest.raises(ImageError, match="is no name of a package"):
        debian.build(place, "x", Recipe(["--oops"]), ids(), Limits())
    with pytest.raises(ImageError, match="is no suite"):
        debian.build(place, "x", Recipe(suite="../x"), ids(), Limits())
    assert place.images() == []


@pytest.mark.needs("mmdebstrap", "userns")
def test_a_failure_of_mmdebstrap_is_told_and_leaves_nothing(place: Store) -> None:
    with pytest.raises(ImageError, match="mmdebstrap failed:"):
        debian._run(["mmdebstrap", "--no-such-option"], 1)
    assert place.images() == []


def test_without_mmdebstrap(place: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="mmdebstrap is not installed"):
        debian.build(place, "x", Recipe(), ids(), Limits())


def test_the_scratch_is_one_that_others_may_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(closed))
    assert debian._scratch() in ("/var/tmp", "/tmp")
