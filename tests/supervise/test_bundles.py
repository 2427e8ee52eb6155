"""Bundles and seccomp profiles in real sandboxes: what paths lead to, and what the kernel does."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sandboxd
from sandboxd.compile import numbers
from sandboxd.errors import PolicyError, PolicyErrors
from sandboxd.job import Job
from sandboxd.policy import Attached, Mount, Policy
from sandboxd.result import Result
from sandboxd.supervise.bundles import LONGEST, load_bundle
from sandboxd.supervise.policies import find
from tests.compile.profiles import ALLOW, DENYING, DIALECT, ERRNO, rule

USR = Mount(source="/usr", target="/usr")


def write(folder: Path, script: str = "echo here", **more: Any) -> Path:
    """A bundle whose root has nothing but links to where /usr will be."""
    root = folder / "rootfs"
    (root / "data").mkdir(parents=True, exist_ok=True)
    (root / "data/file").write_text("of the bundle\n")
    for name in ("bin", "lib", "lib64"):
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {
            "args": ["sh", "-ec", script], "cwd": "/data", "env": ["PATH=/bin", "COLOUR=red"],
            "user": {"uid": 7, "gid": 8}, "rlimits": [
                {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 77}
            ],
        },
        "hostname": "there",
        "mounts": [
            {"destination": "/proc", "type": "proc"},
            {"destination": "/mem", "type": "tmpfs", "options": ["size=64k"]},
            {"destination": "/own", "source": "more", "options": ["bind", "ro"]},
        ],
        "linux": {
            "namespaces": [
                {"type": one} for one in ("pid", "network", "mount", "ipc", "uts")
            ]
        },
    }  # fmt: skip
    (folder / "more").mkdir(exist_ok=True)
    (folder / "more/file").write_text("beside the root\n")
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


def with_usr() -> Policy:
    """Under the caller's uid, to which the files of the bundle belong."""
    found = find("bundle")
    mine = msgspec.structs.replace(found.identity, user="caller")
    return msgspec.structs.replace(found, mounts=(USR,), identity=mine)


async def run(job: Job) -> Result:
    async with sandboxd.open_runner() as runner:
        return await runner.run(job)


@pytest.mark.needs("userns", "overlay")
async def test_a_bundle_runs(tmp_path: Path) -> None:
    script = (
        "pwd; id -u; id -g; hostname; echo $COLOUR; ulimit -n; cat file /own/file; "
        "df -k /mem | tail -1 | { read a size rest; echo $size; }; "
        "echo new >file; cat file; ! echo >/own/new; echo $HOME."
    )
    job = load_bundle(write(tmp_path, script), with_usr())
    assert job.ignored == ()
    result = await run(job)
    assert result.stdout.decode().splitlines() == [
        *("/data", "7", "8", "there", "red", "77", "of the bundle", "beside the root", "64"),
        *("new", "."),
    ], result
    assert (tmp_path / "rootfs/data/file").read_text() == "of the bundle\n"
    assert result.policy.name == "bundle+config.json"


@pytest.mark.needs("userns", "overlay")
async def test_what_is_not_done_stands_in_the_result(tmp_path: Path) -> None:
    job = load_bundle(write(tmp_path, hooks={"prestart": [{"path": "/bin/false"}]}), with_usr())
    result = await run(job)
    assert result.stdout == b"here\n"
    told = {one.what: one.why for one in result.degraded}
    assert told["config.json: hooks"] == "hooks are programs of the host, and are never run"


def test_strict_refuses_what_is_not_done(tmp_path: Path) -> None:
    folder = write(tmp_path, domainname="x")
    assert [what for what, _ in load_bundle(folder).ignored] == ["config.json: domainname"]
    with pytest.raises(PolicyErrors, match=r"^config.json: domainname: not done: there is no NIS"):
        load_bundle(folder, strict=True)


def test_no_path_leads_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "b")
    (tmp_path / "secret").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "inner").symlink_to("rootfs/../rootfs")
    for path in ("/", "..", "link", "../secret", str(tmp_path / "secret"), "rootfs/bin", "nothing",
                 ".", "x\0y"):  # fmt: skip
        config = json.loads((folder / "config.json").read_text()) | {"root": {"path": path}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(PolicyError, match=r"^config.json: root.path: "):
            load_bundle(folder)
    for path in ("inner", str(folder / "rootfs")):
        config = json.loads((folder / "config.json").read_text()) | {"root": {"path": path}}
        (folder / "config.json").write_text(json.dumps(config))
        policy = load_bundle(folder).policy
        assert isinstance(policy, Policy)
        assert policy.root.source == str(folder / "rootfs")
    bind = {"destination": "/x", "source": "link", "options": ["bind", "ro"]}
    write(folder, mounts=[{"destination": "/proc", "type": "proc"}, bind])
    assert [what for what, _ in load_bundle(folder).ignored] == ["config.json: mounts[1]"]


def test_a_config_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(PolicyError, match=r"config.json: cannot be read: No such file .*crun spec"):
        load_bundle(tmp_path)
    os.mkfifo(file)
    with pytest.raises(PolicyError, match=r"config.json: is no regular file"):
        load_bundle(tmp_path)
    file.unlink()
    file.write_bytes(b" " * (LONGEST + 1))
    with pytest.raises(PolicyError, match=r"config.json: more than 1048576 bytes"):
        load_bundle(tmp_path)
    file.write_bytes(b"{}\n\xff")
    with pytest.raises(PolicyError, match=r"config.json:2: not UTF-8"):
        load_bundle(tmp_path)


# -- seccomp


CALL = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "


def python(code: str, policy: Policy) -> Job:
    return Job(argv=["python3", "-c", CALL + code], policy=policy)


def profiled(profile: dict[str, Any]) -> Policy:
    base = find("base")
    attached = Attached(oci="p.json", profile=json.dumps(profile))
    return msgspec.structs.replace(base, syscalls=attached)


@pytest.mark.needs("userns")
async def test_a_profile_decides_in_the_kernel() -> None:
    """As unshare(2), keyctl(2) and the guards' ioctl(2) of a program are answered."""
    asked = "libc.unshare(1 << 28), ctypes.get_errno(), libc.unshare(0), libc.ioctl(0, 0x5412, 0)"
    result = await run(python(f"print({asked}, ctypes.get_errno())", profiled(DENYING)))
    assert result.stdout == b"-1 22 0 -1 1\n", result
    assert result.enforcement["syscalls"] == "profile"
    number = numbers.table(platform.machine())["keyctl"]
    killed = await run(python(f"libc.syscall({number}, 0, 0)", profiled(DENYING)))
    assert killed.status == "syscall_denied"
    assert str(killed.violations[0].rule).endswith("syscalls.oci")


@pytest.mark.needs("userns")
async def test_ordinary_programs_run_under_an_engines_kind_of_profile() -> None:
    script = "import subprocess, threading, socket; socket.socket(); " \
        "t = threading.Thread(target=print, args=['thread']); t.start(); t.join(); " \
        "print(subprocess.check_output(['echo', 'child']))"  # fmt: skip
    result = await run(python(script, profiled(DIALECT)))
    assert result.stdout == b"thread\nb'child\\n'\n", result


@pytest.mark.needs("userns", "overlay")
async def test_a_bundles_filter_is_on_top_of_the_policys(tmp_path: Path) -> None:
    profile = {"defaultAction": ALLOW, "syscalls": [rule("mkdir mkdirat", ERRNO, errnoRet=28)]}
    linux = {"seccomp": profile, "namespaces": []}
    job = load_bundle(write(tmp_path, "mkdir x", linux=linux), with_usr())
    result = await run(job)
    assert b"No space left on device" in result.stderr
    assert result.enforcement["syscalls"] == "allowlist and profile"
    profile["syscalls"] = [rule("mkdir mkdirat", "SCMP_ACT_KILL_PROCESS")]
    result = await run(load_bundle(write(tmp_path, "exec mkdir x", linux=linux), with_usr()))
    assert result.status == "syscall_denied"
    assert str(result.violations[0].rule).endswith(" or config.json: linux.seccomp")
