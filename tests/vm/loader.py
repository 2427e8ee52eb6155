"""Inside of the guest, as root: waits for the second disk to hold a tar, unpacks and becomes it.

While a snapshot of the booted guest is made, that disk holds zeros; the guest that is resumed finds
another one in its place. What can be done before is done before: it is in the snapshot then.
"""

from __future__ import annotations

import mmap
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

DISK = "/dev/vdb"
SWAP = "/swapfile"
JOB = "/run/sandboxd-vm"
SITE = "/usr/local/lib/sandboxd-vm/site"

# What a test run will import, so that its pages are there; and the way through systemd.
WARM = (
    f"PYTHONPATH={SITE} python3 -P -c 'import trio, msgspec, pytest, hypothesis, yaml, json'",
    "XDG_RUNTIME_DIR=/run/user/1000 systemd-run --quiet --user --scope -p Delegate=yes true",
)


def first_block() -> bytes:
    """The first 4096 bytes of the disk and not of the page cache."""
    block = mmap.mmap(-1, 4096)  # O_DIRECT wants it aligned
    disk = os.open(DISK, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        os.preadv(disk, [block], 0)
    finally:
        os.close(disk)
    return bytes(block)


def port(name: str) -> str:
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == name:
            return f"/dev/{entry.name}"
    raise FileNotFoundError(f"no virtio port {name}")


def do(*argv: str) -> None:
    subprocess.run(argv, check=False)


def warm_up() -> None:
    for command in WARM:
        do("runuser", "-u", "tester", "--", "sh", "-c", command)
    do("systemctl", "is-system-running", "--wait", "--quiet")
    do("sync")
    Path(port("control")).write_text("ready\n")


def main() -> None:
    do("fallocate", "-l", "256M", SWAP)
    os.chmod(SWAP, 0o600)
    do("mkswap", "-q", SWAP)
    do("swapon", SWAP)
    warm = False
    while not any(first_block()):
        if not warm:
            warm_up()
            warm = True
        time.sleep(0.05)
    os.mkdir(JOB, 0o755)
    subprocess.run(["tar", "-x", "--no-same-owner", "-f", DISK, "-C", JOB], check=True)
    sys.argv = [f"{JOB}/guest.py", JOB]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
