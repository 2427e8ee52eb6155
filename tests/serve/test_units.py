"""The unit files of docs/howto/run-the-daemon.md, as systemd reads them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent.parent / "docs/howto/run-the-daemon.md"
BLOCKS = re.findall(r"^```ini\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)

OURS = r"sandboxd\.(socket|service)"

pytestmark = pytest.mark.needs("systemd-analyze")


def units(place: Path, socket: str, service: str) -> None:
    place.mkdir()
    (place / "sandboxd.socket").write_text(socket)
    (place / "sandboxd.service").write_text(service)


def verify(place: Path, *flags: str, **environ: str) -> str:
    """What systemd has to say against these units."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *flags,
         *map(str, sorted(place.glob("sandboxd.*")))],
        capture_output=True, text=True, timeout=50, check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{place}:", **environ},
    )  # fmt: skip
    said = [one for one in done.stderr.splitlines() if re.search(OURS, one)]
    return "\n".join(said) + (f"\nexit status {done.returncode}" if done.returncode else "")


def with_keys(unit: str, changes: str) -> str:
    """A unit in which the keys of a part of one have other values."""
    for key, value in re.findall(r"^(\w+)=(.*)$", changes, re.MULTILINE):
        line = f"{key}={value}"
        unit, count = re.subn(rf"^{key}=.*$", line, unit, flags=re.MULTILINE)
        if not count:
            section = re.findall(r"^\[\w+\]$", changes, re.MULTILINE)[0]
            unit = unit.replace(section, f"{section}\n{line}")
    return unit


def test_there_are_four() -> None:
    assert ["[Socket]" in one for one in BLOCKS] == [True, False, True, False]


def test_those_of_a_user(tmp_path: Path) -> None:
    program = tmp_path / ".local/bin/sandboxd"
    program.parent.mkdir(parents=True)
    shutil.copy("/bin/true", program)
    units(tmp_path / "units", *BLOCKS[:2])
    assert (
        verify(tmp_path / "units", "--user", HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path))
        == ""
    )


def test_those_of_the_machine(tmp_path: Path) -> None:
    socket, service = map(with_keys, BLOCKS[:2], BLOCKS[2:])
    assert "ListenStream=/run/sandboxd/sandboxd.sock" in socket
    assert "User=sandboxd" in service
    here = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", service, flags=re.MULTILINE)
    units(tmp_path / "units", socket, here)
    assert verify(tmp_path / "units") == ""


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    program = tmp_path / ".local/bin/sandboxd"
    program.parent.mkdir(parents=True)
    shutil.copy("/bin/true", program)
    units(tmp_path / "units", BLOCKS[0], BLOCKS[1].replace("Type=notify", "Type=nonsense"))
    assert "nonsense" in verify(
        tmp_path / "units", "--user", HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path)
    )
