"""What a job is handed: three streams, a working directory, and nothing of the supervisor's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import trio

from tests.escape.attack import (
    PRELUDE,
    Job,
    achieved,
    any_uid,
    attack,
    every_policy,
    numbers,
    open_runner,
    python,
)

DESCRIPTORS = """
for number in range(4096):
    try:
        os.fstat(number)
    except OSError:
        continue
    found[str(number)] = os.readlink(f"/proc/self/fd/{number}")
"""


def inheritable(stack: ExitStack) -> list[int]:
    """Fifty descriptors of the host's root, as a careless caller has them."""
    numbers = [os.open("/", os.O_RDONLY | os.O_DIRECTORY) for _ in range(50)]
    for number in numbers:
        stack.callback(os.close, number)
        os.set_inheritable(number, True)
    return numbers


@every_policy
async def test_descriptors_of_the_supervisor(policy: str) -> None:
    """Leaked descriptors: CVE-2024-21626 (runc), CVE-2016-9962.

    Countermeasures: the tenant is started with two descriptors, every process closes or marks the
    rest (close_range(2)). In a job that copies files in and out, and in a spare made ahead, too.
    """
    files = {"input": b"x"}
    with ExitStack() as stack:
        inheritable(stack)
        async with open_runner(spares=2) as runner:
            plain = Job(argv=python(DESCRIPTORS), policy=policy)
            copying = Job(argv=python(DESCRIPTORS), policy=policy, files=files, collect=("*",))
            for job in (plain, copying, plain, copying):
                held = achieved(await runner.run(job))
                assert held.keys() == {"0", "1", "2"}
                assert held["0"] == "/dev/null"
                assert held["1"].startswith("pipe:")
                assert held["2"].startswith("pipe:")


def test_the_search_for_descriptors_finds_them() -> None:
    """The same program, not in a sandbox and carelessly started, does see all fifty."""
    with ExitStack() as stack:
        kept = inheritable(stack)
        source = f"{numbers()}{PRELUDE}{DESCRIPTORS}tell()"
        command = [sys.executable, "-I", "-S", "-c", source]
        done = subprocess.run(command, close_fds=False, capture_output=True, check=True)
        held = json.loads(done.stdout)
        assert all(held[str(number)] == "/" for number in kept)


CWD = """
root = os.stat("/")
here = os.getcwd()
for _ in range(64):
    os.chdir("..")
found = {"cwd": here, "link": os.readlink("/proc/self/cwd"), "top": os.listdir(".")}
found["root"] = os.path.samestat(os.stat("."), root)
"""


@every_policy
async def test_working_directory_outside(policy: str) -> None:
    """The way out through the working directory: CVE-2024-21626, CVE-2019-19921; chroot(2).

    Countermeasures: pivot_root(2) with the old root let go, chdir(2) after it, no directory
    descriptor at hand to name one by. Names that go through /proc lead nowhere else.
    """
    async with open_runner() as runner:
        names = [
            "/box",
            "/proc/self/cwd",
            "/proc/self/root",
            "/proc/1/cwd",
            "/proc/1/root",
            "../..",
        ]
        names += [f"/proc/self/fd/{number}" for number in (3, 4, 5, 6, 60, 100)]
        for cwd in names:
            result = await runner.run(Job(argv=python(CWD), policy=policy, cwd=cwd))
            if result.status == "start_failed":
                assert cwd != "/box"
                continue
            found = achieved(result)
            assert found["cwd"].startswith("/")
            assert found["cwd"] in ("/", "/box")
            assert found["link"] == "/"
            assert found["root"]
            assert "work" not in found["top"]
            assert "sys" not in found["top"]


@every_policy
async def test_host_reached_through_stdin(policy: str) -> None:
    """stdin is a file of the host's /dev: openat(2) relative to it, /proc/PID/fd magic links.

    Countermeasures: it is a device, not a directory, and nothing on a path goes through it.
    """
    found = await attack(
        policy,
        """
found["relative"] = tried(os.open, "..", os.O_RDONLY, dir_fd=0)
found["magic"] = tried(os.open, "/proc/self/fd/0/../../etc/shadow", os.O_RDONLY)
found["chdir"] = tried(os.chdir, "/proc/self/fd/0/..")
found["fchdir"] = tried(os.fchdir, 0)
found["chmod"] = tried(os.fchmod, 0, 0o777)
found["chown"] = tried(os.fchown, 0, os.getuid(), -1)
""",
    )
    assert found["chmod"] == found["chown"] == "EPERM"
    assert {found[name] for name in ("relative", "magic", "chdir", "fchdir")} == {"ENOTDIR"}


STDIN = """
def overwrite(path):
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, b"forged", 0)
    finally:
        os.close(fd)

def shared(fd):
    try:
        mmap.mmap(fd, 6, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except PermissionError as error:
        raise OSError(error.errno, "mmap") from None

def grow():
    fd = os.open("/proc/self/fd/0", os.O_RDWR)
    os.ftruncate(fd, 100)

found["write"] = tried(overwrite, "/proc/self/fd/0")
found["grow"] = tried(grow)
found["map"] = tried(lambda: shared(os.open("/proc/self/fd/0", os.O_RDWR)))
found["unseal"] = tried(fcntl.fcntl, 0, 1033, 0)
own = os.memfd_create("own")
found["own"] = tried(overwrite, f"/proc/self/fd/{own}")
found["text"] = sys.stdin.read()
"""


@any_uid
async def test_rewriting_of_stdin(policy: str) -> None:
    """Input shared by several runs, rewritten by the first: fcntl(2), File Sealing.

    Countermeasures: the input lies in a memory file of its own, sealed against writing, growing,
    shrinking and further seals. (`own`: nothing else refuses to write into a memory file.)
    """
    async with open_runner() as runner:
        for _ in range(2):
            job = Job(argv=python(STDIN), policy=policy, stdin=b"honest")
            found = achieved(await runner.run(job))
            assert found["own"] == "ok"
            assert found["text"] == "honest"
            assert {found[name] for name in ("write", "grow", "map", "unseal")} == {"EPERM"}


IN_FLIGHT = """
one, other = socket.socketpair()
def send(through, *fds):
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    through.sendmsg([b"x"], [rights])
send(one, other.fileno(), 1, 2)
send(other, one.fileno(), 1, 2)
"""


@any_uid
async def test_stdout_kept_open_in_flight(policy: str) -> None:
    """A write end of stdout that outlives its processes, in a cycle of sockets: unix(7).

    Countermeasures: the kernel's collector of unreachable sockets; the supervisor's clock.
    """
    with trio.fail_after(50):
        await attack(policy, IN_FLIGHT)


@pytest.mark.parametrize("policy", ["judge-native", "shell"])
async def test_environment_of_the_supervisor(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets in the environment: environ(7), /proc/PID/environ, the stack of a new program.

    Countermeasures: the environment is made of the policy's and the job's, the tenant starts with
    none, init cannot be read.
    """
    secret = "correct-horse-battery-staple"
    monkeypatch.setenv("SANDBOXD_TEST_SECRET", secret)
    found = await attack(
        policy,
        """
found["environ"] = dict(os.environ)
found["files"] = {pid: reads(f"/proc/{pid}/environ") for pid in os.listdir("/proc")
                  if pid.isdigit()}
stack = next(line for line in reads("/proc/self/maps", 1 << 20).splitlines() if "[stack]" in line)
first, last = (int(word, 16) for word in stack.split()[0].split("-"))
with open("/proc/self/mem", "rb", buffering=0) as memory:
    memory.seek(first)
    found["stack"] = memory.read(last - first).decode("latin-1")
""",
        env={"OWN": "mine"},
    )
    assert "OWN=mine" in found["stack"]
    assert secret not in json.dumps(found)
    assert found["files"].pop("1") == "EACCES"
    assert not found["environ"].keys() & {"SANDBOXD_TEST_SECRET", "PYTHONPATH", "XDG_STATE_HOME"}
