"""`./do vm`: the tests, or any command, in a virtual machine with every cgroup v2 controller.

Debian's kernel under QEMU with systemd; the command runs as an ordinary user on the checkout as it
is now. Its output comes as it is written, and its exit status is ours (124: out of time, 125: no
machine). What is not one of the options below is for pytest. CONTRIBUTING.md says how to use it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import FrameType

from tests.vm import image, machine

PLACES = {
    "subtree": "a delegated scope, named by SANDBOXD_CGROUP (default)",
    "scope": "a scope of the user's systemd, delegated",
    "service": "a service of the user's systemd, delegated",
    "session": "a plain login: nothing is delegated",
    "chown": "a subtree that root gave away, named by SANDBOXD_CGROUP; no session",
    "bare": "a cgroup of root's; no session",
    "root": "root itself, in a service of the system's",
}
SLOW = {"tcg": 20.0, "kvm": 2.0}  # SANDBOXD_TEST_SLOW: how much longer things take
LEFT_OUT = {".git", "__pycache__", ".venv", "venv", "node_modules", "build", "dist"}
TEMPORARY = Path("/var/tmp")  # a disk: what the guest writes is kept there
PREFIX = "sandboxd-vm."
OUT_OF_TIME = 124
NO_MACHINE = 125

WATCHDOG = 600  # seconds: above the time limits of tests there
PYTEST = "exec python3 -P -m pytest -p no:cacheprovider -o faulthandler_timeout="
ACCURACY = "exec python3 -P -m tests.vm.accuracy ../extra"
SELECTION = ("-p", "tests.vm.selection")  # where no file or directory is named


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="./do vm",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="places:\n" + "\n".join(f"  {name:8} {what}" for name, what in PLACES.items()),
    )
    parser.add_argument("--cache", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--suite", choices=image.PYTHONS, default="trixie",
                        help="trixie: Linux 6.12 (default); bookworm: 6.1")  # fmt: skip
    parser.add_argument("--place", choices=PLACES, default="subtree", help="see below")
    parser.add_argument("--stock", action="store_true",
                        help="delegate what Debian does: cpu, memory, pids")  # fmt: skip
    parser.add_argument("--command", metavar="SHELL", help="run this instead of the tests")
    parser.add_argument("--accuracy", action="store_true",
                        help="sandboxd and runexec beside the truth")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=1200.0, metavar="SECONDS",
                        help="kill the machine after that (default: 1200)")  # fmt: skip
    parser.add_argument("--cold", action="store_true", help="boot; do not resume a snapshot")
    parser.add_argument("--accel", choices=("tcg", "kvm", "auto"), default="tcg",
                        help="tcg: emulation (default); auto: kvm if it works")  # fmt: skip
    return parser.parse_known_args(argv)


def command(wanted: str | None, rest: list[str]) -> str:
    if wanted is not None:
        return wanted
    paths = any((image.ROOT / word.partition("::")[0]).exists() for word in rest)
    chosen = rest if paths else [*SELECTION, *rest]
    return f"{PYTEST}{WATCHDOG} {shlex.join(chosen)}"


def readable(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """As ./do test has it: everybody may read the checkout, nobody write."""
    if LEFT_OUT & set(Path(entry.name).parts):
        return None
    entry.mode = (entry.mode | 0o444 | (entry.mode & 0o100 and 0o111)) & ~0o022
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def write_disk(path: Path, job: dict[str, object], extra: Path | None = None) -> None:
    """The second disk: guest.py, what it is to do, the checkout, and perhaps more packages."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as disk:
        text = json.dumps(job).encode()
        entry = tarfile.TarInfo("job.json")
        entry.size = len(text)
        disk.addfile(entry, io.BytesIO(text))
        disk.add(image.HERE / "guest.py", "guest.py", filter=readable)
        disk.add(image.ROOT, "src", filter=readable)
        if extra:
            disk.add(extra, "extra", filter=readable)
    if path.stat().st_size > machine.DISK:
        raise machine.MachineError(f"the checkout is too large: over {machine.DISK} bytes")


def accelerator(wanted: str, of: Path) -> str:
    if wanted != "auto":
        return wanted
    return "kvm" if machine.kvm_works(machine.Machine(of)) else "tcg"


def run(options: argparse.Namespace, rest: list[str], folder: Path) -> int:
    with image.ready(options.suite, options.cache) as found:
        accel = accelerator(options.accel, found)
        job = {
            "command": f"{ACCURACY} {shlex.join(rest)}"
            if options.accuracy
            else command(options.command, rest),
            "place": options.place,
            "stock": options.stock,
            "slow": SLOW[accel],
            "seed": os.urandom(512).hex(),
        }
        ours = machine.Machine(found, accel)
        snapshot = None if options.cold else machine.warm(ours, folder)
        extra = image.rival(options.suite, options.cache) if options.accuracy else None
        # The clock is set from this when the guest goes on, a second later.
        write_disk(folder / "second", {**job, "now": time.time() + 1.0}, extra)
        return machine.start(ours, folder / "second", options.timeout, snapshot)


def sweep() -> None:
    """What one of us left that was killed with SIGKILL; its QEMU died with it."""
    for old in TEMPORARY.glob(f"{PREFIX}*"):
        pid = old.name.removeprefix(PREFIX).partition(".")[0]
        if old.stat().st_uid == os.getuid() and not Path("/proc", pid).exists():
            shutil.rmtree(old, ignore_errors=True)


def stop(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def main() -> int:
    options, rest = arguments(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    try:
        sweep()
        prefix = f"{PREFIX}{os.getpid()}."
        with tempfile.TemporaryDirectory(prefix=prefix, dir=TEMPORARY) as folder:
            return run(options, rest, Path(folder))
    except machine.TimeUp:
        print(f"./do vm: not done after {options.timeout:.0f} s", file=sys.stderr)
        return OUT_OF_TIME
    except (machine.MachineError, image.ImageError) as error:
        print(f"./do vm: {error}", file=sys.stderr)
        return NO_MACHINE


if __name__ == "__main__":
    sys.exit(main())
