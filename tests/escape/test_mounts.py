"""Mounts: seen as they were made, and nothing changed, uncovered or added by a job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.escape.attack import (
    CALLER,
    Mount,
    attack,
    every_policy,
    find,
    in_turn,
    plan,
    without,
)

MOUNTING = """
AT_FDCWD, REMOUNT_BIND, writable = -100, 4096 | 32, (ctypes.c_uint64 * 4)(0, 1, 0, 0)
found["tmpfs"] = tried(call, "mount", b"x", b"/tmp", b"tmpfs", 0, None)
found["proc"] = tried(call, "mount", b"x", b"/tmp", b"proc", 0, None)
found["cgroup2"] = tried(call, "mount", b"x", b"/tmp", b"cgroup2", 0, None)
found["overlay"] = tried(call, "mount", b"x", b"/tmp", b"overlay", 0, b"lowerdir=/usr:/etc")
found["bind"] = tried(call, "mount", b"/usr", b"/tmp", None, 4096, None)
found["move"] = tried(call, "mount", b"/usr", b"/tmp", None, 8192, None)
found["remount"] = tried(call, "mount", None, b"/", None, REMOUNT_BIND, None)
found["shared"] = tried(call, "mount", None, b"/", None, 1 << 20, None)
found["umount"] = tried(call, "umount2", b"/proc", 2)
found["setattr"] = tried(call, "mount_setattr", AT_FDCWD, b"/", 0, writable, 32)
found["fsopen"] = tried(call, "fsopen", b"tmpfs", 0)
found["fspick"] = tried(call, "fspick", AT_FDCWD, b"/", 0)
found["fsmount"] = tried(call, "fsmount", 0, 0, 0)
found["open_tree"] = tried(call, "open_tree", AT_FDCWD, b"/usr", 1)
found["move_mount"] = tried(call, "move_mount", AT_FDCWD, b"/usr", AT_FDCWD, b"/tmp", 0)
found["pivot_root"] = tried(call, "pivot_root", b"/tmp", b"/tmp")
found["chroot"] = tried(os.chroot, "/tmp")
"""


@every_policy
async def test_mounting(policy: str) -> None:
    """mount(2), fsopen(2), open_tree(2), move_mount(2), mount_setattr(2), pivot_root(2), chroot(2).

    CVE-2022-0185, CVE-2021-33909, CVE-2020-15257's way on. Countermeasures: seccomp; no
    capability; a Landlock domain, in which nothing is ever mounted.
    """
    found = await attack(policy, MOUNTING)
    assert set(found.values()) == {"EPERM"}, found


async def test_mounting_without_filter() -> None:
    """Having no capability is enough."""
    found = await attack("base", MOUNTING, weaken=without(plan.Filter))
    # open_tree and fspick look for something first; EINVAL and EBADF come before the capability.
    assert set(found.values()) <= {"EPERM", "EINVAL", "EBADF"}, found


POWERFUL = (plan.Filter, plan.DropCapabilities, plan.DropBounding, plan.BecomeUser)
OPENING = ("tmpfs", "bind", "remount", "umount")


@pytest.mark.needs("landlock")
async def test_mounting_as_root_of_the_namespaces() -> None:
    """Root with every capability over its mounts: Landlock alone refuses (landlock(7)).

    Without it all of them work, and /proc is uncovered. (Only as root of the tenant, which no
    job ever is: three layers are gone here. mount_setattr(2) is beyond Landlock.)
    """
    body = "\n".join(line for line in MOUNTING.splitlines() if "root" not in line)
    held = await attack("judge-native", body, weaken=without(*POWERFUL))
    assert {held[name] for name in OPENING} == {"EPERM"}
    open_ = await attack("judge-native", body, weaken=without(*POWERFUL, plan.Landlock))
    assert {open_[name] for name in OPENING} == {"ok"}


@every_policy
async def test_uncovering(policy: str) -> None:
    """What lies below a mount, seen again after umount(2): CVE-2025-31133's aim, masks of /proc.

    Countermeasures: no umount, lazily or by force, of anything.
    """
    found = await attack(
        policy,
        """
before = reads("/proc/self/mountinfo", 1 << 20)
for line in before.splitlines():
    target = line.split()[4].encode()
    for flags in (0, 1, 2, 8):
        found[f"{target} {flags}"] = tried(call, "umount2", target, flags)
found["same"] = "EPERM" if reads("/proc/self/mountinfo", 1 << 20) == before else "changed"
""",
    )
    assert set(found.values()) == {"EPERM"}


REFUSED = {"EROFS", "EACCES", "EPERM", "EXDEV", "ENOENT"}
TEMPLATE = """
for path in ("/new", "/usr/new", "/usr/bin/new", "/etc/new", "/mnt/new", "/run/new",
             "/var/new", "/home/new", "/root/new"):
    found[path] = writes(path, b"left", os.O_WRONLY | os.O_CREAT)
for path in ("/etc/passwd", "/etc/ld.so.cache", "/usr/bin/env", "/usr/bin/python3"):
    found[path] = writes(path)
    held = os.open(path, os.O_PATH)
    for name in (f"/proc/self/fd/{held}", f"/proc/self/task/{os.getpid()}/fd/{held}"):
        found[f"chmod {path} {name[:15]}"] = tried(os.chmod, name, 0o777)
        found[f"open {path} {name[:15]}"] = tried(os.open, name, os.O_WRONLY)
        found[f"time {path} {name[:15]}"] = tried(os.utime, name)
found["replace"] = tried(os.rename, "/box", "/usr")
found["remove"] = tried(os.unlink, "/etc/passwd")
found["xattr"] = tried(os.setxattr, "/etc/passwd", "user.x", b"x")
found["link"] = tried(os.link, "/etc/passwd", "/box/passwd")
"""
DEVICES = """
found["new"] = writes("/dev/new", b"x", os.O_WRONLY | os.O_CREAT)
for name in ("null", "zero", "full", "random", "urandom", "tty"):
    found[name + " mode"] = tried(os.chmod, "/dev/" + name, 0o777)
    found[name + " owner"] = tried(os.chown, "/dev/" + name, os.getuid(), -1)
    found[name + " removed"] = tried(os.unlink, "/dev/" + name)
    found[name + " xattr"] = tried(os.setxattr, "/dev/" + name, "user.x", b"x")
"""


@pytest.mark.parametrize("policy", ["base", "judge-native"])
async def test_writing_to_the_template(policy: str) -> None:
    """A root that jobs share, written to: CVE-2019-5736's aim, and a channel between jobs.

    Countermeasures: every mount of the template is read-only, for all who are not root of it;
    also by way of O_PATH descriptors, which check nothing when they are opened (open(2)).
    """
    found = await attack(policy, TEMPLATE + DEVICES)
    assert set(found.values()) <= REFUSED, found


async def test_writing_to_the_template_as_its_owner() -> None:
    """With the caller's own id the job owns the template, and only the mounts' flag is left."""
    policy = find("base", identity=CALLER)
    held = await attack(policy, TEMPLATE + DEVICES)
    assert set(held.values()) <= REFUSED, held
    writable = without(plan.Restrict, plan.Landlock)
    body = "found['new'] = writes('/new', b'left', os.O_WRONLY | os.O_CREAT)"
    looking = "found['left'] = reads('/new')"
    wrote, saw = await in_turn(policy, body, looking, weaken=writable)
    assert (wrote["new"], saw["left"]) == ("ok", "left")
    wrote, saw = await in_turn(policy, body, looking, weaken=without(plan.Landlock))
    assert (wrote["new"], saw["left"]) == ("EROFS", "ENOENT")
    wrote, saw = await in_turn(policy, body, looking, weaken=without(plan.Restrict))
    assert (wrote["new"], saw["left"]) == ("EACCES", "ENOENT")


@pytest.mark.parametrize("policy", ["shell", "agent"])
async def test_writing_to_a_writable_root(policy: str) -> None:
    """A private copy of the system stays private: overlayfs, CVE-2023-0386, CVE-2021-3493.

    Countermeasures: the upper layer lies on the sandbox's own tmpfs; what is bound from the host
    is read-only. The next job and the host see nothing of it.
    """
    names = ("/new", "/etc/new", "/var/new", "/root/new", "/home/new")
    writing = f"for name in {names}: found[name] = writes(name, b'left', os.O_WRONLY | os.O_CREAT)"
    looking = f"for name in {names}: found[name] = reads(name)"
    before = os.stat("/usr/bin/env")
    wrote, saw = await in_turn(policy, TEMPLATE + writing, looking)
    assert wrote["/new"] == "ok"
    assert set(saw.values()) == {"ENOENT"}
    assert os.stat("/usr/bin/env") == before
    assert not any(map(os.path.lexists, names))


@every_policy
async def test_times_of_devices(policy: str) -> None:
    """utimensat(2) on a device: whoever may write to it sets its times, and they are the host's.

    A job thus writes to an inode of the host, and any other job reads it. Countermeasure: device
    nodes are bound read-only, which devices can be written through all the same.
    """
    before = os.stat("/dev/null").st_mtime_ns
    found = await attack(policy, "found['set'] = tried(os.utime, '/dev/null', (1, 2))")
    own = await attack(policy, "found['now'] = tried(os.utime, '/dev/null')")
    assert found["set"] in ("EPERM", "EROFS")
    assert (own["now"], os.stat("/dev/null").st_mtime_ns) == ("EROFS", before)


@every_policy
async def test_device_nodes(policy: str) -> None:
    """mknod(2) of devices, and what is in /dev: CVE-2016-10124's kind; capabilities(7).

    Countermeasures: no CAP_MKNOD outside; every writable mount is nodev; Landlock. Of the host's
    nodes there are six that everybody may use.
    """
    found = await attack(
        policy,
        """
import stat
for place in ("/box", "/tmp", "/dev/shm"):
    for name, kind, number in (("mem", stat.S_IFCHR, (1, 1)), ("disk", stat.S_IFBLK, (254, 0)),
                               ("null", stat.S_IFCHR, (1, 3)), ("white", stat.S_IFCHR, (0, 0))):
        path = f"{place}/{name}"
        found[path] = tried(os.mknod, path, kind | 0o666, os.makedev(*number))
devices = sorted(os.listdir("/dev"))
found["devices"] = "EPERM" if devices == DEVICES else devices
""".replace("DEVICES", repr(DEV)),
    )
    whites = {found.pop(f"{place}/white") for place in ("/box", "/tmp", "/dev/shm")}
    assert whites <= {"EPERM", "EACCES"}
    assert set(found.values()) <= {"EPERM", "EACCES"}, found


DEV = ["core", "fd", "full", "null", "random", "shm", "stderr", "stdin", "stdout", "tty"]
DEV += ["urandom", "zero"]


async def test_devices_that_are_there_anyway(tmp_path: Path) -> None:
    """A device node in a directory that a policy binds: mount_setattr(2), MOUNT_ATTR_NODEV.

    Countermeasure: nodev on every bind; shown on the flags, as making a node needs root.
    """
    (tmp_path / "data").mkdir(mode=0o755)
    mounts = (Mount(target="/data", source=str(tmp_path / "data"), writable=True),)
    policy = find("base", mounts=mounts)
    flags = (await attack(policy, "found['flags'] = os.statvfs('/data').f_flag"))["flags"]
    assert flags & os.ST_NODEV
    assert flags & os.ST_NOSUID
