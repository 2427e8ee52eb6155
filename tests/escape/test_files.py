"""Files of the host: what a policy does not name is not there, and what it names is as it says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.escape.attack import (
    CALLER,
    Attributes,
    Job,
    Mount,
    achieved,
    attack,
    both,
    every_policy,
    find,
    finished,
    live,
    open_runner,
    plan,
    program,
    python,
    without,
    without_attribute,
)

SEARCHING = """
up = "/".join([".."] * 40)
places = ["", up, "/proc/self/root", "/proc/1/root", "/proc/self/cwd/" + up, "/proc/1/cwd/" + up,
          "/lower", "/mnt", "/box/" + up, "/tmp/" + up, "/old_root", "/dev/" + up,
          "/proc/self/fd/0/..", "/dev/fd/0/..", "/usr/" + up,
          "/proc/thread-self/root", "/proc/self/map_files/.."]
for place in places:
    for name in (SECRET, "/etc/shadow", "/root/.ssh", "/var/lib/dpkg", "/boot", "/sys/kernel",
                 "/etc/ssl/private", "/etc/machine-id", "/run/systemd", "/srv"):
        if os.path.lexists(place + name):
            found.setdefault(place, []).append(name)
found["top"] = sorted(os.listdir("/"))
found["homes"] = [os.listdir("/" + name) for name in ("root", "home", "var", "run", "mnt", "lower")
                  if os.path.isdir("/" + name)]
"""
TOP = {
    *(
        "bin",
        "box",
        "dev",
        "etc",
        "home",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "lower",
        "mnt",
        "proc",
    ),
    *("root", "run", "sbin", "tmp", "usr", "var"),
}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the caller's that everybody may read, once there is a way to it."""
    path = tmp_path / "data" / "secret"
    path.parent.mkdir(mode=0o755)
    path.write_text("correct-horse")
    path.chmod(0o644)
    return path


@every_policy
async def test_files_of_the_host(policy: str, secret: Path) -> None:
    """/root, /home, /etc/shadow, by name, by .. and through /proc: CVE-2019-19921, CVE-2021-30465.

    Countermeasures: a root of its own, the old one let go (pivot_root(2)); /proc/1/root needs
    ptrace access.
    """
    found = await attack(policy, f"SECRET = {str(secret)!r}\n{SEARCHING}")
    assert set(found.pop("top")) <= TOP
    assert not any(found.pop("homes"))
    assert found == {}


async def test_files_of_the_host_that_a_policy_names(secret: Path) -> None:
    """The same search finds the file where a policy binds its directory; and may only read it."""
    mounts = (Mount(target="/data", source=str(secret.parent)),)
    for identity in (find("base").identity, CALLER):
        policy = find("base", mounts=mounts, identity=identity)
        body = """
found["text"] = reads("/data/secret")
found["write"] = writes("/data/secret")
found["new"] = writes("/data/new", b"", os.O_WRONLY | os.O_CREAT)
found["up"] = os.path.samefile("/data/..", "/")
"""
        found = await attack(policy, body)
        assert found["text"] == "correct-horse"
        assert {found["write"], found["new"]} <= {"EROFS", "EACCES"}
        assert found["up"]


@pytest.mark.skipif(not os.path.isdir("/etc/ssl/certs"), reason="needs certificates in /etc/ssl")
@pytest.mark.parametrize("policy", ["ci", "shell", "agent"])
async def test_certificates_without_the_keys_beside_them(policy: str) -> None:
    """Programs that speak TLS need /etc/ssl/certs, and nobody /etc/ssl/private: update-ca-certs(8).

    Countermeasure: of /etc/ssl only what the policy names is there, not the directory as a whole.
    """
    found = await attack(
        policy,
        """
found["ssl"] = sorted(os.listdir("/etc/ssl"))
found["empty"] = [name for name in os.listdir("/etc/ssl/certs")
                  if name.endswith(".pem") and not reads("/etc/ssl/certs/" + name)]
found["certificates"] = len(os.listdir("/etc/ssl/certs"))
found["write"] = writes("/etc/ssl/certs/new", b"", os.O_WRONLY | os.O_CREAT)
""",
    )
    assert set(found["ssl"]) <= {"certs", "openssl.cnf"}
    assert found["certificates"] == len(os.listdir("/etc/ssl/certs"))
    assert found["empty"] == []
    assert found["write"] in ("EROFS", "EACCES")


BY_HANDLE = """
handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
mount = ctypes.c_int()
found["name"] = tried(call, "name_to_handle_at", -100, b"/usr", handle, ctypes.byref(mount), 0)
here = os.open("/usr", os.O_RDONLY)
for number in (1, 2, 11, 12):
    root = ctypes.create_string_buffer(struct.pack("IiII", 8, 1, number, 0), 136)
    found[f"open {number}"] = tried(call, "open_by_handle_at", here, root, os.O_RDONLY)
"""


@every_policy
async def test_files_by_handle(policy: str) -> None:
    """open_by_handle_at(2): shocker.c opened the host's root by its inode number, 2.

    Countermeasures: seccomp; the kernel asks for CAP_DAC_READ_SEARCH.
    """
    found = await attack(policy, BY_HANDLE)
    assert set(found.values()) == {"EPERM"}
    bare = await attack(policy, BY_HANDLE, weaken=without(plan.Filter))
    assert {value for name, value in bare.items() if name != "name"} == {"EPERM"}


WATCHING = """
IN_OPEN = 0x20
try:
    watch = call("inotify_init1", 0)
except OSError:  # there is none here, and nothing to see
    ready()
    tell()
    sys.exit()
for path in (b"/usr/bin", b"/etc/ld.so.cache", b"/dev/null"):
    call("inotify_add_watch", watch, path, IN_OPEN)
ready()
names, poll = [], select.poll()
poll.register(watch, select.POLLIN)
while poll.poll(0):
    data = os.read(watch, 65536)
    while data:
        length = struct.unpack_from("iIII", data)[3]
        names.append(data[16:16 + length].rstrip(bytes(1)).decode() or "a file")
        data = data[16 + length:]
found["names"] = names
"""


@every_policy
async def test_watching_what_others_open(policy: str) -> None:
    """inotify(7) on files that the host and all jobs share tells who opens what, and when.

    Countermeasure: no inotify. An overlay has inodes of its own, but what is bound from the host's
    /etc and /dev has not.
    """
    async with open_runner(slots=2) as runner:
        async with live(runner, policy, WATCHING) as spy:
            os.close(os.open("/usr/bin/env", os.O_RDONLY))
            await runner.run(Job(argv=("/usr/bin/printf", "x"), policy=policy))
            found = await finished(spy)
    assert found.get("names", []) == [], found


async def test_watching_finds_what_is_opened() -> None:
    """The same program, under a policy that has inotify, sees what is opened in its own sandbox."""
    syscalls = msgspec.structs.replace(find("shell").syscalls, enosys=())
    found = await attack(
        find("shell", syscalls=syscalls),
        WATCHING.replace("ready()", 'open("/usr/bin/env").close()'),
    )
    assert found["names"] == ["env"]


LOCKING = """
file = os.open("/usr/bin/env", os.O_RDONLY)
found["flock"] = tried(fcntl.flock, file, fcntl.LOCK_SH | fcntl.LOCK_NB)
found["posix"] = tried(fcntl.lockf, file, fcntl.LOCK_SH | fcntl.LOCK_NB)
"""
CONTENDING = """
file = os.open("/usr/bin/env", os.O_RDONLY)
found["flock"] = tried(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
null = os.open("/dev/null", os.O_RDWR)
found["null"] = tried(fcntl.flock, null, fcntl.LOCK_EX | fcntl.LOCK_NB)
found["lease"] = tried(fcntl.fcntl, file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
found["notify"] = tried(fcntl.fcntl, os.open("/usr", os.O_RDONLY), fcntl.F_NOTIFY, 1)
"""


@pytest.mark.parametrize("policy", ["judge-native", "judge-python"])
async def test_locks_on_shared_files(policy: str) -> None:
    """flock(2) on a file of the shared root: a channel between two submissions at work.

    Countermeasures: in the policies of a judge a lock succeeds and locks nothing.
    """
    async with open_runner(slots=2) as runner:
        async with live(runner, policy, LOCKING + "ready()") as holder:
            found = achieved(await runner.run(Job(argv=python(CONTENDING), policy=policy)))
            assert (found["flock"], found["null"]) == ("ok", "ok")
            await finished(holder)
        async with live(runner, "base", LOCKING + "ready()") as holder:
            found = achieved(await runner.run(Job(argv=python(CONTENDING), policy="base")))
            assert found["flock"] == "EAGAIN"  # where locks are real, the channel is
            await finished(holder)


@every_policy
async def test_leases(policy: str) -> None:
    """A lease stalls the next who opens the file, for 45 s: fcntl(2), F_SETLEASE, F_NOTIFY.

    Countermeasure: seccomp, on the lower half of the command.
    """
    found = await attack(
        policy,
        """
file = os.open("/box/mine", os.O_RDWR | os.O_CREAT)
for upper in (0, 1 << 32, 0xffffffff << 32):
    found[f"lease {upper:#x}"] = tried(call, "fcntl", file, 1024 | upper, 1)
    found[f"notify {upper:#x}"] = tried(call, "fcntl", file, 1026 | upper, 1)
""",
    )
    assert set(found.values()) == {"EPERM"}


# -- programs that give rights ----------------------------------------------------------------

WHO = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(void) {
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    unsigned long long permitted = 0;
    while (fgets(line, sizeof line, status))
        sscanf(line, "CapPrm: %llx", &permitted);
    uid_t real, effective, saved;
    getresuid(&real, &effective, &saved);
    printf("{\"gained\": %d, \"root\": %d, \"capabilities\": %llu}\n",
           real != effective, effective == 0, permitted);
}
"""
GIVING = """
import os, struct, sys
CAP_NET_RAW, VERSION_2 = 1 << 13, 0x02000000
os.setxattr(sys.argv[1], "security.capability",
            struct.pack("<IIIII", VERSION_2, CAP_NET_RAW, 0, 0, 0))
"""


def planted(tmp_path: Path, mode: int) -> Path:
    path = tmp_path / "planted" / "who"
    path.parent.mkdir(mode=0o755)
    path.write_bytes(program(WHO))
    path.chmod(mode)
    return path


async def run_planted(path: Path, policy: str, weaken: Any = None) -> dict[str, Any]:
    body = "import subprocess\nfound = json.loads(subprocess.check_output(['/planted/who']))"
    mounts = (Mount(target="/planted", source=str(path.parent)),)
    return await attack(find(policy, mounts=mounts), body, weaken=weaken)


NOTHING = {"gained": 0, "root": 0, "capabilities": 0}
NO_NEW_PRIVILEGES = (plan.NoNewPrivileges, plan.Landlock, plan.Filter)
"""The kernel admits the other two only after it (prctl(2), PR_SET_NO_NEW_PRIVS)."""
NOSUID = without_attribute(Attributes.NOSUID, "/planted")


@pytest.mark.needs("gcc", "subuid")
async def test_set_user_id_programs(tmp_path: Path) -> None:
    """A set-user-id program of the tenant's root (who is its owner): execve(2), CVE-2023-0386.

    Countermeasures: no_new_privs; nosuid on every mount. Each is enough; without both it is root
    of the tenant's user namespace.
    """
    path = planted(tmp_path, 0o4755)
    for policy in ("base", "judge-native", "shell", "agent"):
        assert await run_planted(path, policy) == NOTHING
    assert await run_planted(path, "judge-native", NOSUID) == NOTHING
    assert await run_planted(path, "judge-native", without(*NO_NEW_PRIVILEGES)) == NOTHING
    weaken = both(NOSUID, without(*NO_NEW_PRIVILEGES))
    found = await run_planted(path, "judge-native", weaken)
    assert found == {"gained": 1, "root": 1, "capabilities": 0}  # the bounding set is empty


@pytest.mark.needs("gcc", "subuid")
async def test_file_capabilities(tmp_path: Path) -> None:
    """A program with file capabilities of the tenant's namespace: capabilities(7), user.overlay.

    Countermeasures: no_new_privs, nosuid, and an empty bounding set. Each is enough.
    """
    path = planted(tmp_path, 0o755)
    command = ["unshare", "--map-root-user", sys.executable, "-I", "-c", GIVING, str(path)]
    await trio.run_process(command)
    for policy in ("base", "judge-native", "shell", "agent"):
        assert await run_planted(path, policy) == NOTHING
    kinds = (*NO_NEW_PRIVILEGES, plan.DropBounding)
    for enough in (
        without(*kinds),
        both(NOSUID, without(plan.DropBounding)),
        both(NOSUID, without(*NO_NEW_PRIVILEGES)),
    ):
        assert await run_planted(path, "judge-native", enough) == NOTHING
    found = await run_planted(path, "judge-native", both(NOSUID, without(*kinds)))
    assert found["capabilities"] == 1 << 13


@every_policy
async def test_set_user_id_of_the_jobs_own(policy: str) -> None:
    """A set-user-id file among the job's input, and one the job makes: nosuid, no_new_privs."""
    found = await attack(
        policy,
        """
import shutil, subprocess
shutil.copy("/usr/bin/id", "/box/id")
os.chmod("/box/id", 0o6755)
ids = [subprocess.check_output([name, "-u"]) for name in ("/box/id", "/usr/bin/id")]
found["gained"] = ids[0] != ids[1]
found["flags"] = {place: bool(os.statvfs(place).f_flag & os.ST_NOSUID)
                  for place in ("/", "/usr", "/box", "/tmp", "/dev/shm", "/proc", "/dev")}
""",
    )
    assert not found["gained"]
    assert all(found["flags"].values()), found["flags"]
