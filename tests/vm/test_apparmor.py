"""The AppArmor profile of `sandboxd setup`: AppArmor takes it, and sandboxd works under it.

Debian's AppArmor restricts nobody's user namespaces (that is Ubuntu's), so what is shown here is
that the profile is one, and that it takes nothing away.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.probe.setup import rules

ABI = Path("/etc/apparmor.d/abi/4.0")
KERNEL = Path("/sys/kernel/security/apparmor")
AS_ROOT = os.geteuid() == 0

pytestmark = [
    pytest.mark.root_ok,
    pytest.mark.time_limit(100),
    pytest.mark.skipif(not ABI.exists(), reason=f"AppArmor is older than 4: there is no {ABI}"),
]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    file = tmp_path / "sandboxd"
    file.write_text("\n".join([*rules(f"{tmp_path}/bin/sandboxd"), ""]))
    return file


def parser(*words: str | Path) -> None:
    subprocess.run(["apparmor_parser", "--skip-cache", *words], check=True)


def test_apparmor_reads_the_profile(profile: Path) -> None:
    parser("--skip-kernel-load", profile)


def test_a_profile_that_is_none_is_refused(profile: Path) -> None:
    profile.write_text(profile.read_text().replace("userns", "usernss"))
    with pytest.raises(subprocess.CalledProcessError):
        parser("--skip-kernel-load", profile)


@pytest.fixture
def loaded(profile: Path) -> Iterator[None]:
    parser("--replace", profile)
    try:
        yield
    finally:
        parser("--remove", profile)


@pytest.mark.skipif(not AS_ROOT, reason="only root loads profiles")
@pytest.mark.skipif(not KERNEL.exists(), reason="AppArmor is not on in this kernel")
def test_sandboxd_works_under_the_profile(loaded: None) -> None:
    under = ["aa-exec", "-p", "sandboxd", "--"]
    shown = subprocess.run(
        [*under, "cat", "/proc/self/attr/current"], check=True, capture_output=True, text=True
    )
    assert shown.stdout.split() == ["sandboxd", "(unconfined)"]
    run = [*under, sys.executable, "-m", "sandboxd", "run", "--", "echo", "hello"]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    assert done.stdout == "hello\n"
