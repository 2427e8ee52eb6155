"""`sandboxd run --bundle`: what crun makes runs here, under flags, and tells what is not done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("crun", "userns", "overlay")


def sandboxd(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "sandboxd", *words]
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """What `crun spec` writes, and a root in which /usr will be the host's."""
    folder = tmp_path / "bundle"
    (folder / "rootfs").mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (folder / "rootfs" / name).symlink_to(f"usr/{name}")
    subprocess.run(["crun", "spec"], cwd=folder, check=True)
    return folder


def run(bundle: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return sandboxd("run", "--bundle", str(bundle), "-v", "/usr:/usr:ro", *words)


def test_a_bundle_of_crun_runs_its_own_words(bundle: Path) -> None:
    """`sh`, whose input is at its end."""
    done = run(bundle)
    assert (done.returncode, done.stdout) == (0, "")
    assert "sandboxd: not done: config.json: process.capabilities (a program has none)\n" in (
        done.stderr
    )


@pytest.mark.needs("packages")
def test_a_bundle_with_a_root_of_its_own_runs(bundle: Path) -> None:
    """busybox and nothing else."""
    for name in ("bin", "lib", "lib64"):
        (bundle / "rootfs" / name).unlink()
    script = "apt-get -qq download busybox-static && dpkg -x busybox-static*.deb rootfs"
    subprocess.run(["sh", "-ec", script], cwd=bundle, check=True, capture_output=True)
    done = sandboxd("run", "-q", "--bundle", str(bundle), "--", "busybox", "uname", "-n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "crun\n", "")


def test_words_and_flags_take_the_place_of_the_bundles(bundle: Path) -> None:
    script = "id -u; pwd; echo $A $TERM; cat /proc/sys/kernel/hostname"
    flags = ["-q", "-u", "5", "-w", "/tmp", "-e", "A=b", "--hostname", "other"]
    done = run(bundle, *flags, "--", "sh", "-c", script)
    assert done.stdout.splitlines() == ["5", "/tmp", "b xterm", "other"], done
    assert done.stderr == ""


def test_a_root_of_the_operators(bundle: Path, tmp_path: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["root"]["path"] = "/"
    (bundle / "config.json").write_text(json.dumps(config))
    done = run(bundle, "--", "true")
    assert done.returncode == 125
    assert "config.json: root.path: '/' leads out of the bundle" in done.stderr
    (bundle / "rootfs").rename(tmp_path / "mine")
    done = run(bundle, "-q", "--root", str(tmp_path / "mine"), "--", "echo", "here")
    assert done.stdout == "here\n", done


def test_strict_refuses_and_says_everything(bundle: Path) -> None:
    done = run(bundle, "--strict", "--", "true")
    assert done.returncode == 125
    lines = [line for line in done.stderr.splitlines() if ": not done: " in line]
    assert len(lines) == len(done.stderr.splitlines()) > 3


def test_what_is_not_done_is_in_the_record_and_in_the_plan(bundle: Path) -> None:
    done = run(bundle, "--json", "--", "true")
    assert done.stderr == ""
    told = [one["what"] for one in json.loads(done.stdout)["degraded"]]
    assert "config.json: process.capabilities" in told
    plan = sandboxd("plan", "--bundle", str(bundle))
    assert "config.json: process.capabilities" in plan.stdout.partition("not enforced:")[2]


def test_a_policy_of_ones_own_is_kept_to(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "bundle"\nlimits.open_files = 50\n')
    done = run(bundle, "-p", str(tmp_path / "mine.toml"), "--", "sh", "-c", "ulimit -n")
    assert done.stdout == "50\n", done
    assert "config.json: process.rlimits[0] (mine allows 50)" in done.stderr


def test_flags_that_make_no_sense_together(bundle: Path) -> None:
    assert "--strict without --bundle" in sandboxd("run", "--strict", "--", "true").stderr
    assert "--bundle and --image exclude" in run(bundle, "--image", "x", "--", "true").stderr
