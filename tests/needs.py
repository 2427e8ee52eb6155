"""The facts about this host that a test may need, each found out by doing it, once.

Use as `@pytest.mark.needs("fuse", "memory")`. A test that lacks one skips, naming it and why.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")
PROGRAMS = {
    "chromium": ("chromium", "--version"),
    "crun": ("crun", "--version"),
    "docker-registry": ("docker-registry", "--version"),
    "go": ("go", "version"),
    "java": ("java", "-version"),
    "mmdebstrap": ("mmdebstrap", "--version"),
    "ip": ("ip", "-V"),
    "nft": ("nft", "--version"),
    "objdump": ("objdump", "--version"),
    "pasta": ("pasta", "--version"),
    "rustc": ("rustc", "--version"),
    "skopeo": ("skopeo", "--version"),
    "slirp4netns": ("slirp4netns", "--version"),
    "strace": ("strace", "--version"),
    "bwrap": ("bwrap", "--ro-bind", "/", "/", "--unshare-pid", "true"),
    "userns": ("unshare", "--map-root-user", "true"),
    "subuid": ("unshare", "--map-root-user", "--map-auto", "true"),
    "systemd-analyze": ("systemd-analyze", "--version"),
}
LANDLOCK_CREATE_RULESET = 444  # the same number on every architecture
LANDLOCK_CREATE_RULESET_VERSION = 1


def hidden_processes(how: str) -> tuple[str, ...]:
    """What to start a command with, so that /proc hides processes from it; needs userns.

    An ordinary user may mount a proc in a PID namespace; a second user namespace takes the
    capabilities away that would let it see them all the same.
    """
    again = 'exec unshare --user --map-user=1000 --map-group=1000 "$@"'
    script = f"mount -t proc -o hidepid={how} proc /proc && {again}"
    unshare = ("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child")
    return (*unshare, "sh", "-c", script, "sh")


def works(*argv: str) -> str:
    """Why this command does not work here, or nothing."""
    if shutil.which(argv[0]) is None:
        return f"no {argv[0]} in PATH"
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return ""
    return f"{' '.join(argv)}: {done.stderr.strip() or f'exit {done.returncode}'}"


def opens(path: str) -> str:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def cgroup() -> str:
    top = os.environ.get("SANDBOXD_CGROUP")
    if top is None:
        return "SANDBOXD_CGROUP names no delegated cgroup v2 subtree"
    probe = Path(top, f"probe.{os.getpid()}")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"{probe}: {error.strerror}"
    return ""


def controller(name: str) -> str:
    if reason := cgroup():
        return reason
    top = Path(os.environ["SANDBOXD_CGROUP"])
    there = (top / "cgroup.controllers").read_text().split()
    if name not in there:
        return f"{top} has no {name} controller (it has: {' '.join(there) or 'none'})"
    try:
        (top / "cgroup.subtree_control").write_text(f"+{name}")
    except OSError as error:
        return f"{top}/cgroup.subtree_control: {error.strerror}"
    return ""


def systemd_user() -> str:
    """A user manager that answers; it needs no session and no environment."""
    runtime = f"/run/user/{os.getuid()}"
    if os.geteuid() == 0:
        return "root has the system's systemd"
    return works("env", f"XDG_RUNTIME_DIR={runtime}", "systemctl", "--user", "list-units", "-q")


def own_cgroup() -> Path:
    line = next(
        line for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"
    )
    return Path("/sys/fs/cgroup", line[4:])


def outside() -> str:
    """We are where an ordinary user usually is: in a cgroup that belongs to root."""
    own = own_cgroup()
    if not (own / "cgroup.procs").exists():
        return f"no {own}: not a pure cgroup v2 machine"
    return f"{own} belongs to us" if os.access(own / "cgroup.procs", os.W_OK) else ""


def prepared() -> str:
    """We are in a subtree that an administrator gave us, and no systemd unit is above."""
    if reason := outside():
        own = own_cgroup()
        unit = [part for part in own.parts if part.endswith((".service", ".scope", ".slice"))]
        ours = reason.endswith("belongs to us") and not unit and os.geteuid() != 0
        return "" if ours else f"{own} is no prepared subtree"
    return f"{own_cgroup()} belongs to root"


def delegated(*names: str, missing: tuple[str, ...] = ()) -> str:
    """What the system's systemd gives to the user's."""
    uid = os.getuid()
    top = Path(f"/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service")
    try:
        have = (top / "cgroup.controllers").read_text().split()
    except OSError as error:
        return f"{top}: {error.strerror}"
    if set(names) - set(have) or set(missing) & set(have):
        return f"{top} has {' '.join(have) or 'no controllers'}"
    return ""


def systemd_system() -> str:
    """We are root, and may tell the system's systemd what to do."""
    if os.geteuid() != 0:
        return "not root"
    return works("systemctl", "list-units", "-q", "--no-pager")


def disposable() -> str:
    """Somebody vouches that nobody needs this machine afterwards: it may be set up by tests."""
    named = os.environ.get("SANDBOXD_DISPOSABLE") == "1"
    return "" if named and os.geteuid() == 0 else "not root of a machine with SANDBOXD_DISPOSABLE=1"


def open_checkout() -> str:
    """Every user may read this checkout, and so run what is in it."""
    here = Path(__file__).resolve()
    closed = next((path for path in here.parents if not path.stat().st_mode & 0o001), None)
    return f"{closed} is closed to other users" if closed else ""


def fuse() -> str:
    return opens("/dev/fuse") or works("fuse-overlayfs", "--version")


def landlock() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(LANDLOCK_CREATE_RULESET)
    version = libc.syscall(
        number, None, ctypes.c_size_t(0), ctypes.c_uint(LANDLOCK_CREATE_RULESET_VERSION)
    )
    return "" if version > 0 else f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}"


def overlay() -> str:
    """The kernel's overlay in a user namespace, its upper directory where state is kept."""
    base = os.environ.get("XDG_STATE_HOME")
    with tempfile.TemporaryDirectory(dir=base if base and Path(base).is_dir() else None) as top:
        for name in ("lower", "upper", "work", "root"):
            Path(top, name).mkdir()
        options = f"userxattr,lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/work"
        mount = f"mount -t overlay -o {options} overlay {top}/root"
        # the work directory holds a directory of mode 0000 afterwards
        return works(
            "unshare",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            f"{mount} && rm -rf {top}/work/work",
        )


def packages() -> str:
    """Whether the machine's package sources are there to be asked."""
    with tempfile.TemporaryDirectory() as top:
        return works("sh", "-c", f"cd {top} && apt-get -qq download busybox-static")


def compiler(name: str) -> str:
    """A compiler without its headers is none."""
    with tempfile.TemporaryDirectory() as top:
        source = Path(top, "probe.c" if name == "gcc" else "probe.cpp")
        source.write_text("#include <stdio.h>\nint main(void) { return 0; }\n")
        return works(name, "-o", f"{top}/probe", str(source))


PROBES: dict[str, Callable[[], str]] = {
    "cgroup": cgroup,
    "disposable": disposable,
    "fuse": fuse,
    "landlock": landlock,
    "open-checkout": open_checkout,
    "outside": outside,
    "overlay": overlay,
    "packages": packages,
    "prepared": prepared,
    "systemd-stock": functools.partial(
        delegated, "cpu", "memory", "pids", missing=("cpuset", "io")
    ),
    "systemd-memory": functools.partial(delegated, "cpu", "memory", "pids"),
    "systemd-system": systemd_system,
    "systemd-user": systemd_user,
    "tun": functools.partial(opens, "/dev/net/tun"),
    **{name: functools.partial(controller, name) for name in CONTROLLERS},
    **{name: functools.partial(compiler, name) for name in ("gcc", "g++")},
    **{name: functools.partial(works, *argv) for name, argv in PROGRAMS.items()},
}


@functools.cache
def missing(fact: str) -> str:
    """Why this host lacks the fact; empty if it has it."""
    if fact not in PROBES:
        raise ValueError(f"needs({fact!r}): unknown; known are {' '.join(sorted(PROBES))}")
    return PROBES[fact]()
