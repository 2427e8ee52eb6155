"""Inside of the guest, as root: runs the command as the user tester, placed as asked for.

Comes on the second disk with the checkout (src/) and what is to be done (job.json). What the
command writes goes out through two ports as it is written; how it ended goes through a third.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import BinaryIO

SITE = "/usr/local/lib/sandboxd-vm/site"
CGROUPS = Path("/sys/fs/cgroup")
CONTROLLERS = "cpu cpuset io memory pids"
RNDRESEEDCRNG = 0x5207  # random(4)
UID = 1000
HOME = "/home/tester"

SCOPE = "systemd-run --user --scope --quiet --collect -p Delegate=yes bash"
SERVICE = "systemd-run --user --pipe --wait --quiet --collect -p Delegate=yes bash"

# As ./do test does it: a leaf for the tests themselves, and the variable.
SUBTREE = f"""
SANDBOXD_CGROUP=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
export SANDBOXD_CGROUP
mkdir "$SANDBOXD_CGROUP/leaf"
echo $$ >"$SANDBOXD_CGROUP/leaf/cgroup.procs"
for controller in {CONTROLLERS}; do
    echo "+$controller" >"$SANDBOXD_CGROUP/cgroup.subtree_control" || :
done
"""


def port(name: str) -> Path:
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == name:
            return Path("/dev", entry.name)
    raise FileNotFoundError(f"no virtio port {name}")


def settle(now: float, seed: bytes) -> None:
    """A resumed guest has the clock and the random numbers of its snapshot."""
    time.clock_settime(time.CLOCK_REALTIME, now)
    with open("/dev/urandom", "r+b", buffering=0) as pool:
        pool.write(seed)
        fcntl.ioctl(pool, RNDRESEEDCRNG)


def stock() -> None:
    """Back to the controllers that Debian delegates."""
    Path("/etc/systemd/system/user@.service.d/delegate.conf").unlink()
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    subprocess.run(["systemctl", "restart", f"user@{UID}.service"], check=True)


def group(name: str, owner: int) -> Path:
    """A cgroup of the administrator's, given to this user if it is not root's."""
    top = CGROUPS / name
    leaf = top / "leaf"
    leaf.mkdir(parents=True)
    (top / "cgroup.subtree_control").write_text(" ".join(f"+{c}" for c in CONTROLLERS.split()))
    for folder in (top, leaf):
        for entry in (".", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
            os.chown(folder / entry, owner, owner)
    return leaf


def script(job: dict[str, object], path: Path) -> Path:
    """What bash runs in the place: the environment, the directory, the command."""
    place = str(job["place"])
    top = Path("/var/tmp/tester")
    exports = {
        "PYTHONPATH": f"{path.parent}/src:{SITE}",
        "SANDBOXD_TEST_SLOW": str(job["slow"]),
        "SANDBOXD_TEST_DIR": str(top),
        "TMPDIR": str(top / "tmp"),
        "XDG_CACHE_HOME": str(top / "cache"),
        "XDG_STATE_HOME": str(top / "state"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(top / "cache/hypothesis"),
    }
    if place == "root":
        exports["SANDBOXD_DISPOSABLE"] = "1"  # tests may do to this machine what they like
    if place in ("bare", "chown", "root"):  # no session, so nobody made /run/user/UID for it
        exports["XDG_RUNTIME_DIR"] = str(top / "run")
    for folder in (top, top / "tmp", top / "cache", top / "state", top / "run"):
        folder.mkdir(mode=0o700)
        if place != "root":
            os.chown(folder, UID, UID)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    if place == "subtree":
        lines.append(SUBTREE)
    if place == "chown":
        lines.append(f"export SANDBOXD_CGROUP={CGROUPS}/chown")
    lines += [f"cd {path.parent}/src", str(job["command"]), ""]
    path.write_text("\n".join(lines))
    return path


def make_room_for_bytecode(src: Path) -> None:
    """The checkout is read-only, but for what a second Python need not compile again."""
    ours = (path for room in ("sandboxd", "tests", "fuzz") for path in (src / room).rglob("*.py"))
    for folder in {path.parent for path in ours}:
        cache = folder / "__pycache__"
        cache.mkdir(mode=0o755)
        os.chown(cache, UID, UID)


def start(place: str, path: Path, out: int, err: int) -> subprocess.Popen[bytes]:
    env = {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "LANG": "C.UTF-8",
        "HOME": HOME,
        "USER": "tester",
        "LOGNAME": "tester",
        "SHELL": "/bin/bash",
    }
    if place in ("subtree", "scope", "service"):
        env["XDG_RUNTIME_DIR"] = f"/run/user/{UID}"
        env["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path=/run/user/{UID}/bus"
    if place == "root":
        env |= {"HOME": "/root", "USER": "root", "LOGNAME": "root"}
    become = ["setpriv", "--reuid", "tester", "--regid", "tester", "--init-groups", "--"]
    argv = {
        "subtree": [*become, *SCOPE.split(), str(path)],
        "scope": [*become, *SCOPE.split(), str(path)],
        "service": [*become, *SERVICE.split(), str(path)],
        "session": ["runuser", "-l", "tester", "-c", f"exec bash {path}"],
        "bare": [*become, "bash", str(path)],
        "chown": [*become, "bash", str(path)],
        "root": ["bash", str(path)],
    }[place]
    leaf = group(place, UID if place == "chown" else 0) if place in ("bare", "chown") else None

    def enter() -> None:
        Path("/proc/self/oom_score_adj").write_text("0")  # ours is lower
        if leaf:
            (leaf / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, preexec_fn=enter
    )


def copy(pipe: int, to: BinaryIO) -> None:
    while block := os.read(pipe, 65536):
        to.write(block)


def main(folder: Path, out: BinaryIO, err: BinaryIO) -> int:
    job = json.loads((folder / "job.json").read_text())
    settle(job["now"], bytes.fromhex(job["seed"]))
    if job["stock"]:
        stock()
    make_room_for_bytecode(folder / "src")
    path = script(job, folder / "command")
    pumps = []
    ends = []
    for to in (out, err):
        reading, writing = os.pipe()
        os.fchown(writing, UID, UID)  # the command may open /dev/stdout anew
        pumps.append(threading.Thread(target=copy, args=(reading, to), daemon=True))
        ends.append(writing)
    started = start(job["place"], path, *ends)
    for writing in ends:
        os.close(writing)
    for pump in pumps:
        pump.start()
    status = started.wait()
    for pump in pumps:
        pump.join(2.0)  # what the command left running may hold the pipes open for ever
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    with (
        open(port("out"), "wb", buffering=0) as out,
        open(port("err"), "wb", buffering=0) as err,
    ):
        try:
            code = main(Path(sys.argv[1]), out, err)
        except BaseException:
            with contextlib.suppress(OSError):
                err.write(traceback.format_exc().encode())
            code = 125
    port("control").write_text(f"exit {code}\n")
    time.sleep(60)  # the host ends the machine
