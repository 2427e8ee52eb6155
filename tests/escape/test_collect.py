"""What is copied out of a sandbox: names and files that a hostile program chose."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import trio

from sandboxd import Tar
from tests.escape.attack import (
    Identity,
    Job,
    JobError,
    Mount,
    Policy,
    Result,
    achieved,
    any_uid,
    every_policy,
    find,
    limited,
    open_runner,
    python,
)
from tests.images.making import END, file, folder, hard, link


async def collected(
    policy: str | Policy, body: str, patterns: Sequence[str] = ("**",)
) -> tuple[Result, dict[str, bytes], dict[str, str]]:
    """The result; path -> content of what came out; path -> reason of what did not."""
    async with open_runner() as runner:
        job = Job(argv=python(body), policy=policy, collect=tuple(patterns))
        result = await runner.run(job)
    files = {one.path: one.data for one in result.artifacts}
    return result, files, {one.path: one.reason for one in result.artifact_errors}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("correct-horse")
    return path


LINKS = """
targets = {"absolute": SECRET, "shadow": "/etc/shadow", "above": "../" * 40 + SECRET[1:],
           "passwd": "/etc/passwd", "memory": "/proc/self/mem", "descriptor": "/proc/self/fd/0",
           "root": "/proc/1/root" + SECRET}
for name, target in targets.items():
    os.symlink(target, name)
os.symlink("/", "folder")
os.symlink(os.path.dirname(SECRET), "near")
os.symlink("loop", "loop")
os.mkdir("real")
os.symlink("/etc", "real/etc")
open("honest", "w").write("mine")
"""


@every_policy
async def test_symbolic_links(policy: str, secret: Path) -> None:
    """Links to the host's files in what is collected: CVE-2024-28185 (Judge0), CVE-2021-30465.

    Countermeasures: nothing is collected before every process is dead; no component of a name is
    followed if it is a link (O_NOFOLLOW, one directory at a time).
    """
    patterns = ("**", "absolute", "folder/etc/passwd", "near/secret", "real/etc/passwd", "honest")
    _, files, reasons = await collected(policy, f"SECRET = {str(secret)!r}\n{LINKS}", patterns)
    assert files == {"honest": b"mine"}
    assert reasons["absolute"] == "is a symbolic link"
    assert set(reasons.values()) <= {"is a symbolic link", "missing"}


SPECIAL = """
os.mkfifo("fifo")
server = socket.socket(socket.AF_UNIX)
server.bind("socket")
found["device"] = tried(os.mknod, "device", 0o020666, os.makedev(1, 3))
found["white"] = tried(os.mknod, "white", 0o020666, 0)
os.mkdir("closed")
open("closed/file", "w").write("closed")
os.chmod("closed", 0)
open("unreadable", "w").write("unreadable")
os.chmod("unreadable", 0)
open("honest", "w").write("mine")
"""


@every_policy
async def test_fifos_sockets_and_devices(policy: str) -> None:
    """A FIFO stalls whoever opens it, a device does what devices do: fifo(7), open(2).

    Countermeasures: only regular files are opened, without blocking, and looked at again after;
    there can be no devices (test_mounts.py). Modes of 0 stop nobody but the job.
    """
    with trio.fail_after(50):
        _, files, reasons = await collected(policy, SPECIAL)
    assert files.pop("honest") == b"mine"
    assert files == {"closed/file": b"closed", "unreadable": b"unreadable"}
    assert (reasons.pop("fifo"), reasons.pop("socket")) == ("is a FIFO", "is a socket")
    assert reasons in ({}, {"white": "is a device"})


HARD_LINKS = """
held = os.open("/etc/passwd", os.O_PATH)
found["link"] = tried(os.link, "/etc/passwd", "/box/linked")
found["magic"] = tried(os.link, f"/proc/self/fd/{held}", "/box/magic", follow_symlinks=True)
found["empty"] = tried(call, "linkat", held, b"", -100, b"/box/empty", 0x1000)
found["stdin"] = tried(call, "linkat", 0, b"", -100, b"/box/stdin", 0x1000)
found["program"] = tried(os.link, "/usr/bin/env", "/box/env")
"""


@any_uid
async def test_hard_links(policy: str) -> None:
    """Another name for a file of the host's, put where files are collected: link(2), CVE-2015-1335.

    Countermeasures: nothing of the host's is on the file system of the working directory (EXDEV).
    """
    result, files, reasons = await collected(policy, HARD_LINKS)
    assert set(achieved(result).values()) <= {"EXDEV", "ENOENT", "EPERM"}
    assert (files, reasons) == ({}, {})


@every_policy
async def test_set_user_id_bits_are_not_carried_out(policy: str) -> None:
    """A program that would have rights where the caller unpacks it: chmod(2), CVE-2024-28189.

    Countermeasure: of a mode only the permissions come out.
    """
    body = "open('tool', 'w').write('x')\nos.chmod('tool', 0o6777)"
    result, files, _ = await collected(policy, body)
    assert files == {"tool": b"x"}
    assert {one.mode for one in result.artifacts} == {0o777}


AFTERWARDS = """
open("file", "w").write("first")
if os.fork() == 0:
    os.setsid()
    for number in range(1, 65):
        if number not in (9, 19, 32, 33):
            signal.signal(number, signal.SIG_IGN)
    os.close(1)
    os.close(2)
    while True:  # swaps a file and a link to the host for as long as it lives
        os.symlink("/etc/passwd", "other")
        os.rename("other", "file")
        with open("other", "w") as file:
            file.write("second")
        os.rename("other", "file")
"""


@any_uid
async def test_swapping_while_files_are_collected(policy: str) -> None:
    """A file that turns into a link between look and open: CVE-2018-15664, symlink-exchange races.

    Countermeasure: the PID namespace is dead before the first name is looked at.
    """
    for _ in range(5):
        _, files, reasons = await collected(policy, AFTERWARDS, ("file",))
        assert files.get("file") in (b"first", b"second", b"", None)
        assert set(reasons.values()) <= {"is a symbolic link"}


HUGE = """
with open("sparse", "w") as file:
    tried(os.ftruncate, file.fileno(), 1 << 40)
with open("large", "w") as file:
    tried(os.ftruncate, file.fileno(), 100 << 20)
for number in range(1200):
    open(f"many{number}", "w").close()
path = "deep"
for _ in range(100):
    os.mkdir(path)
    path += "/d"
os.mkdir(b"bytes\\xff\\n")
open(b"bytes\\xff\\n/\\x1b[31m", "w").write("odd")
"""


@any_uid
async def test_bombs_among_collected_files(policy: str) -> None:
    """Sparse files, thousands of files, deep trees, names of any bytes: path_resolution(7).

    Countermeasures: caps on bytes, files, depth and names, said in the result; a name is data.
    """
    with trio.fail_after(50):
        result, files, reasons = await collected(limited(policy, file_size=1 << 41), HUGE)
    assert len(files) <= 1000
    assert sum(map(len, files.values())) <= 64 << 20
    assert "large" not in files
    assert any("files" in reason for reason in reasons.values())
    odd = os.fsdecode(b"bytes\xff\n/\x1b[31m")
    assert files.get(odd) == b"odd" or odd not in files
    assert all(stat.S_IMODE(one.mode) == one.mode for one in result.artifacts)


async def test_names_of_input_files() -> None:
    """Input files whose names lead elsewhere: CVE-2024-28189 (Judge0), tar's and zip's slips.

    Countermeasures: such names are refused; a link among the input is not followed.
    """
    for name in ("/etc/x", "../x", "a/../../x", "", "a\0b", ".."):
        with pytest.raises(JobError):
            Job(argv=("true",), files={name: b"x"})


PLANTED = """
os.mkdir("out")
for name in ("out/key", "key", "pipe"):
    open(name, "w").write("mine")
os.symlink(SECRET_FOLDER, "/shared/out")
os.symlink(SECRET_FOLDER + "/key", "/shared/key")
os.mkfifo("/shared/pipe")
"""


@pytest.mark.parametrize("pattern", ["out/*", "key", "pipe"])
async def test_links_planted_where_collected_files_go(tmp_path: Path, pattern: str) -> None:
    """A job may write to the directory that its files are collected to: CVE-2018-15664 (docker cp).

    Countermeasures: the way to a file's place is looked up beneath the directory and through no
    link (openat2(2)), what is there is replaced and never written to, and only if it is a file.
    """
    outside, shared = tmp_path / "outside", tmp_path / "shared"
    for made in (outside, shared):
        made.mkdir()
    (outside / "key").write_text("correct-horse")
    identity = Identity(user="caller")
    policy = find("base", mounts=(Mount(target="/shared", source=str(shared), writable=True),))
    policy = msgspec.structs.replace(policy, identity=identity)
    body = f"SECRET_FOLDER = {str(outside)!r}\n{PLANTED}"
    async with open_runner() as runner:
        job = Job(argv=python(body), policy=policy, collect=[pattern], collect_to=shared)
        with pytest.raises(JobError, match="collect_to"):
            await runner.run(job)
        assert sorted(os.listdir(shared)) == ["key", "out", "pipe"]  # it did plant them
    assert (outside / "key").read_text() == "correct-horse"
    assert os.listdir(outside) == ["key"]


async def test_archives_among_the_input(tmp_path: Path) -> None:
    """An archive of a stranger's as a job's input: zip slip, CVE-2007-4559, CVE-2001-1267.

    Countermeasures: as for all input: names below their place, and no way through a link. Links to
    the host's files are links into the sandbox's own root.
    """
    secret = tmp_path / "key"
    secret.write_text("correct-horse")
    out = link(b"out", os.fsencode(tmp_path))
    for evil in (
        out + file(b"out/key"),
        link(b"key", os.fsencode(secret)) + hard(b"same", os.fsencode(secret)),
        file(b"../" * 40 + os.fsencode(secret)[1:]),
        out + folder(b"out/below"),
    ):
        with pytest.raises(JobError):
            async with open_runner() as runner:
                await runner.run(Job(argv=["true"], files={"t": Tar(evil + END)}))
    async with open_runner() as runner:
        job = Job(argv=["cat", "t/key"], files={"t": Tar(link(b"key", b"/etc/shadow") + END)})
        result = await runner.run(job)
    assert (result.status, result.stdout) == ("nonzero_exit", b"")
    assert os.listdir(tmp_path) == ["key"]
    assert secret.read_text() == "correct-horse"
