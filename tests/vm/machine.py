"""QEMU: one throw-away machine, from a snapshot of the booted guest where there is one.

Theory of operation. The guest has three ports, which are pipes of ours: out, err, control. It gets
its command on a second disk, a tar written raw. What it writes to its root disk goes to a temporary
file without a name. It says "exit N" on the control port, and QEMU is ended. Whatever else happens
ends QEMU as well: our deadline, our death in any way (PDEATHSIG), `timeout` around it, a panic of
the guest's kernel.

The first start from an image boots with a second disk of zeros. When the guest says "ready", its
memory is saved beside its root disk; later starts go on from there, with another second disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.vm.image import ImageError, held, run

DISK = 512 << 20  # bytes of the second disk: the same for every start, or no snapshot would fit
BOOT = 180.0  # seconds until a booting guest must be ready
LINGER = 0.1  # seconds for the last bytes: they are in the pipes by then
ENDING = 3.0  # seconds for QEMU to end when it is told to
PROBE = 10  # seconds in which KVM must have said something

KERNEL = (
    "root=/dev/vda rw console=ttyS0 quiet panic=-1 oops=panic mitigations=off audit=0 "
    "no_timer_check tsc=reliable systemd.show_status=0 fsck.mode=skip"
)
# Without these a guest clears pages by words and not by bytes: page faults are 4 times as fast.
# QEMU 7.2 now and then breaks the flags after cmpxchg16b, which the kernel's allocator uses: panic.
CPU = {"tcg": "max,-erms,-fsrm,-la57,-smap,-smep,-cx16", "kvm": "host"}
ACCEL = {"tcg": "tcg,thread=multi,tb-size=256", "kvm": "kvm"}
PORTS = ("out", "err", "control")


class MachineError(Exception):
    """The machine did not do its work; the message holds the end of what it said."""


class TimeUp(MachineError):
    """It was killed because its time was up."""


@dataclass(frozen=True, slots=True)
class Machine:
    """An image and how to start it. The same machine has the same snapshot."""

    image: Path
    accel: str = "tcg"

    def hardware(self) -> list[str]:
        argv = ["-M", "q35", "-accel", ACCEL[self.accel], "-cpu", CPU[self.accel]]
        argv += ["-smp", "2", "-m", "2048", "-nodefaults", "-no-user-config"]
        argv += ["-display", "none", "-no-reboot", "-append", KERNEL]
        argv += ["-kernel", f"{self.image}/vmlinuz", "-initrd", f"{self.image}/initrd"]
        # A network card that leads nowhere: pasta wants a default route.
        argv += ["-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n,romfile="]
        return [*argv, "-device", "virtio-serial-pci"]

    def snapshot(self) -> Path:
        version = run("qemu", ["qemu-system-x86_64", "--version"])
        parts = [version, *self.hardware(), str(DISK)]
        if self.accel == "kvm":
            parts.append(os.uname().release)
        return self.image / f"warm-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def disks(root: Path, kind: str, second: Path, *, keep: bool) -> list[str]:
    """The root disk, whose changes are kept or not, and the one with the command."""
    change = "off" if keep else "on"
    return [
        "-drive",
        f"file={root},format={kind},if=none,id=root,snapshot={change},cache=unsafe",
        *("-device", "virtio-blk-pci,drive=root"),
        *("-drive", f"file={second},format=raw,if=none,id=second,readonly=on"),
        *("-device", "virtio-blk-pci,drive=second"),
    ]


class Running:
    """A QEMU that runs: what comes out of its ports, and its monitor on stdin."""

    def __init__(self, process: subprocess.Popen[bytes], ports: dict[str, int]) -> None:
        self.process = process
        self.ports = ports

    def follow(self, deadline: float, out: BinaryIO, err: BinaryIO) -> str:
        """Pass on what comes until the guest says a line; that line, or '' if QEMU ended.

        Raises TimeUp at the deadline (time.monotonic).
        """
        said = b""
        with selectors.DefaultSelector() as selector:
            for name, port in self.ports.items():
                selector.register(port, selectors.EVENT_READ, name)
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                for key, _ in selector.select(left):
                    block = os.read(key.fd, 65536)
                    if not block:
                        selector.unregister(key.fd)
                    elif key.data == "control":
                        said += block
                        # The guest wrote all else before this.
                        deadline = min(deadline, time.monotonic() + LINGER)
                    else:
                        to = {"out": out, "err": err}[key.data]
                        to.write(block)
                        to.flush()
            else:
                return said.decode().strip()
        if not said:
            raise TimeUp
        return said.decode().strip()

    def monitor(self, command: str, seconds: float) -> int:
        """The last commands that QEMU gets; its exit status."""
        self.process.communicate(command.encode(), timeout=seconds)
        return self.process.returncode


@contextmanager
def running(argv: list[str], seconds: float, folder: Path) -> Iterator[Running]:
    """QEMU runs in the block and not after it; what it says of itself is in the folder."""
    pipes = {name: os.pipe() for name in PORTS}
    ports: list[str] = []
    for name, (_, writing) in pipes.items():
        ports += ["-chardev", f"file,id={name},path=/proc/self/fd/{writing},append=on"]
        ports += ["-device", f"virtserialport,chardev={name},name={name}"]
    dies = ["setpriv", "--pdeathsig", "KILL"]
    limit = f"{seconds + 10:.0f}"  # our own deadline comes first
    command = [*dies, "timeout", "--kill-after=5", limit, *dies, "qemu-system-x86_64", *argv]
    command += [*ports, "-monitor", "stdio", "-serial", f"file:{folder}/console"]
    with open(folder / "qemu.log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[writing for _, writing in pipes.values()],
            env={**os.environ, "TMPDIR": str(folder)},
        )
    try:
        for _, writing in pipes.values():
            os.close(writing)
        yield Running(process, {name: reading for name, (reading, _) in pipes.items()})
    finally:
        process.terminate()  # `timeout`, which hands it on and waits
        try:
            process.communicate(timeout=ENDING)
        except subprocess.TimeoutExpired:
            process.kill()  # QEMU dies with it
            process.communicate()
        for reading, _ in pipes.values():
            os.close(reading)


def story(folder: Path) -> str:
    """The end of what QEMU and the guest's kernel said."""
    said = []
    for name in ("qemu.log", "console"):
        path = folder / name
        if path.exists():
            text = path.read_bytes()[-8000:].decode(errors="replace")
            said += [line for line in text.splitlines()[-60:] if not line.startswith("(qemu)")]
    return "\n".join(said)


def save(machine: Machine, to: Path, folder: Path) -> None:
    """Boot, and keep the booted guest in a directory that is whole or not there."""
    new = Path(tempfile.mkdtemp(prefix="new.", dir=to.parent))
    try:
        disk, state, zeros = new / "root", new / "state", folder / "zeros"
        base = ["-b", str(machine.image / "root.img"), "-F", "raw"]
        run("disk", ["qemu-img", "create", "-q", "-f", "qcow2", *base, str(disk)])
        zeros.touch()
        os.truncate(zeros, DISK)
        argv = [*machine.hardware(), *disks(disk, "qcow2", zeros, keep=True)]
        with running(argv, BOOT * 2, folder) as booting:
            nothing = open(os.devnull, "wb")  # noqa: SIM115 - closed below
            with nothing:
                if booting.follow(time.monotonic() + BOOT, nothing, nothing) != "ready":
                    raise MachineError("no guest")
            time.sleep(1.0)  # let it become idle: what is half done now is half done in every run
            command = f'migrate_set_parameter max-bandwidth 8G\nmigrate "exec:cat >{state}"\nquit\n'
            if booting.monitor(command, BOOT) != 0 or not state.exists():
                raise MachineError("no state")
        new.chmod(0o755)
        new.rename(to)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def warm(machine: Machine, folder: Path) -> Path | None:
    """The snapshot, made if need be; None if that cannot be."""
    snapshot = machine.snapshot()
    if snapshot.is_dir():
        return snapshot
    with held(machine.image.parent / f"{machine.image.name}.warm", fcntl.LOCK_EX):
        if snapshot.is_dir():
            return snapshot
        for old in machine.image.glob("new.*"):
            shutil.rmtree(old, ignore_errors=True)
        try:
            save(machine, snapshot, folder)
        except (MachineError, ImageError, subprocess.TimeoutExpired) as error:
            print(f"./do vm: no snapshot ({error}); booting each time", file=sys.stderr)
            print(story(folder), file=sys.stderr)
            return None
    return snapshot


def once(argv: list[str], deadline: float, folder: Path) -> int | None:
    """The command's exit status; None if the machine ended without saying."""
    left = max(deadline - time.monotonic(), 1.0)
    with running(argv, left, folder) as machine:
        said = machine.follow(deadline, sys.stdout.buffer, sys.stderr.buffer)
    word, _, code = said.rpartition("\n")[2].partition(" ")
    return int(code) if word == "exit" else None


def start(machine: Machine, second: Path, seconds: float, snapshot: Path | None) -> int:
    """Run what is on the second disk, from the snapshot or by booting; its exit status.

    Raises TimeUp after that many seconds, MachineError if the guest died.
    """
    deadline = time.monotonic() + seconds
    os.truncate(second, DISK)
    if snapshot:
        state = ["-incoming", f"exec:cat {snapshot}/state"]
        argv = [*disks(snapshot / "root", "qcow2", second, keep=False), *state]
    else:
        argv = disks(machine.image / "root.img", "raw", second, keep=False)
    code = once([*machine.hardware(), *argv], deadline, second.parent)
    if code is None:
        raise MachineError(story(second.parent))
    return code


def kvm_works(machine: Machine) -> bool:
    """Does the kernel say a word under KVM in time? /dev/kvm may be there and hang."""
    if not os.access("/dev/kvm", os.W_OK):
        return False
    argv = ["timeout", "--kill-after=1", str(PROBE), "qemu-system-x86_64", "-M", "q35"]
    argv += ["-no-reboot", "-nodefaults", "-display", "none", "-m", "512"]
    argv += ["-accel", "kvm", "-cpu", "host"]
    argv += ["-kernel", f"{machine.image}/vmlinuz", "-append", "console=ttyS0 panic=-1"]
    argv += ["-serial", "stdio"]
    with tempfile.TemporaryFile() as said:
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False)
        said.seek(0)
        return b"Linux version" in said.read()
