"""The guest's disk: Debian out of its packages, with the tests' Python packages, made once.

Nothing of it is in the project. What apt on this machine is told (archive, proxies, certificates)
goes for the guest's packages, too. An image lies in a directory named by the hash of all that
decides about it; it is made beside and renamed, so there is a whole one or none.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
"""Suite -> its Python. The older one has Linux 6.1, the oldest kernel that is supported."""

PACKAGES = (
    "linux-image-cloud-amd64,systemd-sysv,dbus,dbus-user-session,libpam-systemd,udev,kmod",
    "util-linux,mount,passwd,login,procps,iproute2",
    "python3,libseccomp2,gcc,g++,libc6-dev,binutils",
    "uidmap,fuse-overlayfs,fuse3,slirp4netns,passt,nftables,bubblewrap,crun,strace,memtester",
)
MORE = {"bookworm": (), "trixie": ("apparmor",)}
"""AppArmor of Debian 12 keeps pasta from network namespaces that it did not make."""

FILES = ("setup.sh", "loader.py")  # of this directory, used inside of the image
DISK = "4G"  # sparse
UNUSED = 14 * 86400.0  # seconds after which an image that nobody used goes

OPTIONS = (
    "--variant=minbase",
    "--aptopt=APT::Install-Recommends false",
    '--aptopt=Acquire::Languages "none"',
    *(f"--dpkgopt=path-exclude=/usr/share/{place}/*" for place in ("doc", "man", "locale")),
    # A small initrd, made when the kernel is configured.
    "--essential-hook=mkdir -p $1/etc/initramfs-tools/conf.d",
    "--essential-hook=echo MODULES=list >$1/etc/initramfs-tools/conf.d/vm",
    "--essential-hook=printf '%s\\n' virtio_pci virtio_blk ext4 >$1/etc/initramfs-tools/modules",
)

# Runs as root of the new system, outside of it. A bind mount that is not recursive shows the tree
# without /proc, /sys and /dev that mmdebstrap has mounted in it.
MAKE_DISK = """
set -eu
cp "$1"/boot/vmlinuz-* "$2/vmlinuz"
cp "$1"/boot/initrd.img-* "$2/initrd"
rm -r "$1"/boot/*
truncate -s "$3" "$2/root.img"
unshare -m --propagation private sh -euc '
    mount --bind "$1" /mnt
    mke2fs -q -t ext4 -F -m 0 -E lazy_itable_init=1,lazy_journal_init=1 -d /mnt "$2/root.img"
' sh "$1" "$2"
chmod 0644 "$2"/*
"""


class ImageError(Exception):
    """The image could not be made; the message says at which step."""


def locked(requirements: str, unwanted: frozenset[str]) -> str:
    """The blocks of requirements.lock whose package is not unwanted, hashes and all."""
    blocks = re.split(r"(?m)^(?=[A-Za-z0-9])", requirements)
    names = (re.match(r"[A-Za-z0-9._-]*", block) for block in blocks)
    return "".join(
        block
        for block, name in zip(blocks, names, strict=True)
        if name is None or name[0].lower() not in unwanted
    )


def only_for_checks(pyproject: str) -> frozenset[str]:
    """The packages that `./do check` needs and no test does: large, some of them."""
    group = tomllib.loads(pyproject)["dependency-groups"]["check"]
    return frozenset(re.split(r"[^A-Za-z0-9._-]", name, maxsplit=1)[0].lower() for name in group)


def requirements() -> str:
    unwanted = only_for_checks((ROOT / "pyproject.toml").read_text())
    return locked((ROOT / "requirements.lock").read_text(), unwanted)


def key(suite: str) -> str:
    """What tells one image from another; where the packages come from does not."""
    parts = [
        suite,
        PYTHONS[suite],
        *PACKAGES,
        *MORE[suite],
        *OPTIONS,
        MAKE_DISK,
        DISK,
        requirements(),
    ]
    parts += [(HERE / name).read_text() for name in FILES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def apt_options(dump: str) -> Iterator[str]:
    """How this machine reaches an archive, out of `apt-config dump`: one option a line."""
    for line in dump.splitlines():
        if re.match(r"Acquire::(https?|Check-|Retries|ForceIPv)", line) and '""' not in line:
            yield line


def archive(targets: str) -> str:
    """The first Debian archive in lines of `label|address`; empty if this machine has none."""
    for line in targets.splitlines():
        label, _, address = line.partition("|")
        if label == "Debian":
            return address.rstrip("/")
    return ""


def run(step: str, argv: list[str]) -> str:
    """Run a command of the build; its stdout, or ImageError with the end of its stderr."""
    # Python in the new system shall not write where ours does.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**env, "LC_ALL": "C.UTF-8"},
        check=False,
    )
    if done.returncode == 0:
        return done.stdout
    said = (done.stderr or done.stdout).strip()[-3000:]
    raise ImageError(f"{step}: {argv[0]} exited with {done.returncode}:\n{said}")


def install(suite: str, to: Path, *what: str) -> None:
    """Python packages, resolved for the guest's Python; nothing of them is run."""
    python = PYTHONS[suite]
    tag = f"cp{python.replace('.', '')}"
    argv = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--no-input"]
    argv += ["--disable-pip-version-check", "--root-user-action=ignore", "--no-compile"]
    argv += ["--target", str(to), "--python-version", python, "--implementation", "cp"]
    for abi in (tag, "abi3", "none"):
        argv += ["--abi", abi]
    for glibc in ("manylinux2014", "manylinux_2_17", "manylinux_2_28"):
        argv += ["--platform", f"{glibc}_x86_64"]
    run("python packages", [*argv, "--only-binary", ":all:", "--no-deps", *what])


def site(suite: str, to: Path) -> None:
    """What the tests need, as the lock has it."""
    listed = to.with_suffix(".txt")
    listed.write_text(requirements())
    install(suite, to, "--require-hashes", "-r", str(listed))


def rival(suite: str, cache: Path) -> Path:
    """BenchExec, the newest when it was first asked for; for comparison only, so not locked."""
    to = cache / "vm" / f"benchexec-{suite}"
    if not to.is_dir():
        with held(to.with_suffix(".lock"), fcntl.LOCK_EX):
            if not to.is_dir():
                new = Path(tempfile.mkdtemp(prefix="new.", dir=to.parent))
                try:
                    install(suite, new, "benchexec")
                    new.chmod(0o755)
                    new.rename(to)
                finally:
                    shutil.rmtree(new, ignore_errors=True)
    return to


def bootstrap(suite: str, work: Path, out: Path) -> None:
    """mmdebstrap: the packages, our setup.sh inside of them, and a disk made of it."""
    files = work / "files"
    files.mkdir()
    for name in FILES:
        shutil.copy(HERE / name, files)
    site(suite, files / "site")
    argv = ["mmdebstrap", "--quiet", "--skip=cleanup/reproducible", *OPTIONS]
    options = apt_options(run("apt", ["apt-config", "dump"]))
    argv += [f"--aptopt={option}" for option in options]
    argv += [
        f"--include={','.join((*PACKAGES, *MORE[suite]))}",
        "--customize-hook=mkdir $1/vm",
        f"--customize-hook=copy-in {files}/setup.sh {files}/loader.py {files}/site /vm",
        "--customize-hook=chroot $1 sh /vm/setup.sh",
        f'--customize-hook=sh {work}/disk.sh "$1" {out} {DISK}',
        suite,
        "/dev/null",
    ]
    (work / "disk.sh").write_text(MAKE_DISK)
    targets = ["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)"]
    if mirror := archive(run("apt", [*targets, "Created-By: Packages"])):
        argv.append(mirror)
    run("mmdebstrap", argv)


def build(suite: str, to: Path) -> None:
    # Unless we are root, the disk is made by subordinate uids, which must get there: not through
    # a home directory. Nobody else can guess the name of the inner directory.
    base = to.parent if os.geteuid() == 0 else Path(tempfile.gettempdir())
    work = Path(tempfile.mkdtemp(prefix="image.", dir=base))
    try:
        work.chmod(0o711)
        out = Path(tempfile.mkdtemp(prefix="out.", dir=work))
        out.chmod(0o777)
        bootstrap(suite, work, out)
        new = Path(tempfile.mkdtemp(prefix="new.", dir=to.parent))
        try:
            for name in ("root.img", "vmlinuz", "initrd"):
                argv = ["cp", "--sparse=always", "--reflink=auto", str(out / name), str(new)]
                run("copy", argv)
            new.chmod(0o755)
            new.rename(to)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def held(path: Path, how: int) -> Iterator[None]:
    """A lock on a file, until the block ends or the process does."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Under the lock of builds: what an interrupted build left, and images nobody uses now."""
    for old in folder.iterdir():
        if old.name.startswith(("image.", "new.")):
            shutil.rmtree(old, ignore_errors=True)
        elif old.is_dir() and time.time() - old.stat().st_mtime > UNUSED:
            try:
                with held(folder / f"{old.name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(old)
            except BlockingIOError:
                continue


@contextmanager
def ready(suite: str, cache: Path) -> Iterator[Path]:
    """The directory with the image (root.img, vmlinuz, initrd), built if need be; ours to read.

    Raises ImageError.
    """
    folder = cache / "vm"
    folder.mkdir(parents=True, exist_ok=True)
    to = folder / f"{suite}-{key(suite)}"
    with held(folder / f"{to.name}.lock", fcntl.LOCK_SH):
        if not to.is_dir():
            with held(folder / "build.lock", fcntl.LOCK_EX):  # the second finds it done
                if not to.is_dir():
                    sweep(folder)
                    print(f"./do vm: making the image for {suite}: {to}", file=sys.stderr)
                    started = time.monotonic()
                    build(suite, to)
                    taken = time.monotonic() - started
                    print(f"./do vm: made in {taken:.0f} s", file=sys.stderr)
        os.utime(to)
        yield to
