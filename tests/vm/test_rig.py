"""The parts of the rig that decide: what is in an image, what is run, what goes onto its disk."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.vm import __main__ as vm
from tests.vm import image

LOCK = """\
ruff==0.17.5 \\
    --hash=sha256:aa
    # via sandboxd (pyproject.toml:check)
Trio==0.35.0 ; sys_platform == 'linux' \\
    --hash=sha256:bb \\
    --hash=sha256:cc
    # via sandboxd (pyproject.toml)
ruff-extras==1
"""


def test_packages_for_checks_are_left_out_with_their_hashes() -> None:
    left = image.locked(LOCK, frozenset({"ruff"}))
    assert left == LOCK[LOCK.index("Trio") :]
    assert image.locked(LOCK, frozenset({"trio"})).count("--hash") == 1
    assert image.locked(LOCK, frozenset()) == LOCK


def test_which_packages_are_for_checks() -> None:
    text = '[dependency-groups]\ncheck = ["mypy>=1.18", "Ruff>=0.14", "types-PyYAML"]\n'
    assert image.only_for_checks(text) == {"mypy", "ruff", "types-pyyaml"}


def test_our_own_lock() -> None:
    names = {line.partition("==")[0] for line in image.requirements().splitlines() if "==" in line}
    assert {"trio", "pytest", "hypothesis", "msgspec"} <= names
    assert not {"ruff", "mypy"} & names


def test_how_this_machine_reaches_an_archive() -> None:
    dump = """\
APT::Architecture "amd64";
Acquire "";
Acquire::http "";
Acquire::http::Proxy "http://[::1]:3142";
Acquire::https::CAInfo "/etc/ssl/own.pem";
Acquire::Check-Valid-Until "false";
Acquire::Languages:: "none";
"""
    assert list(image.apt_options(dump)) == dump.splitlines()[3:6]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("", ""),
        ("Ubuntu|http://one/ubuntu/\n", ""),
        ("Debian-Security|http://two/security/\nDebian|http://two/debian/\n", "http://two/debian"),
        ("Debian|http://one/debian\nDebian|http://two/debian\n", "http://one/debian"),
    ],
)
def test_the_archive_of_this_machine(targets: str, found: str) -> None:
    assert image.archive(targets) == found


def test_suites_have_their_own_images() -> None:
    assert len({image.key(suite) for suite in image.PYTHONS}) == len(image.PYTHONS)
    assert image.key("trixie") == image.key("trixie")


@pytest.mark.parametrize(
    ("rest", "selected"),
    [
        ([], True),
        (["-q", "-k", "memory"], True),
        (["tests/vm"], False),
        (["-q", "tests/vm/test_rig.py::test_our_own_lock"], False),
    ],
)
def test_a_path_replaces_the_selection(rest: list[str], selected: bool) -> None:
    line = vm.command(None, rest)
    assert (" ".join(vm.SELECTION) in line) == selected
    assert line.endswith(" ".join(rest))


def test_words_are_quoted_and_a_command_is_not() -> None:
    assert vm.command(None, ["-k", "one or two"]).endswith("-k 'one or two'")
    assert vm.command("echo $HOME", []) == "echo $HOME"


def test_what_is_not_ours_is_for_pytest() -> None:
    given = ["--cache", "/c", "--suite", "bookworm", "-q", "--place", "bare", "-k", "one", "tests"]
    options, rest = vm.arguments(given)
    assert (options.suite, options.place, options.cache) == ("bookworm", "bare", Path("/c"))
    assert rest == ["-q", "-k", "one", "tests"]


@pytest.mark.parametrize(
    ("mode", "expected"), [(0o600, 0o644), (0o700, 0o755), (0o666, 0o644), (0o755, 0o755)]
)
def test_the_checkout_is_readable_and_no_more(mode: int, expected: int) -> None:
    entry = tarfile.TarInfo("src/do")
    entry.mode, entry.uid, entry.uname = mode, 1234, "somebody"
    there = vm.readable(entry)
    assert there is not None
    assert (there.mode, there.uid, there.uname) == (expected, 0, "")


def test_what_tools_leave_in_a_checkout_stays_there() -> None:
    for name in ("src/.git", "src/.git/config", "src/tests/__pycache__/a.pyc"):
        assert vm.readable(tarfile.TarInfo(name)) is None


def test_the_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    vm.write_disk(disk, {"command": "true"})
    with tarfile.open(fileobj=io.BytesIO(disk.read_bytes() + bytes(1 << 20))) as found:
        names = set(found.getnames())
        member = found.extractfile("job.json")
        assert member is not None
        assert json.load(member) == {"command": "true"}
    assert {"guest.py", "src/do", "src/tests/vm/test_rig.py"} <= names
