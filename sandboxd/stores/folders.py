"""What every store has in common: its place, how a folder appears and goes, and who holds it.

A folder is made under a name that begins with NEW and appears by a rename, whole, so who reads
takes no lock on the store. Who uses a folder holds a shared lock on it (flock(2)), and it is
removed only by who got the exclusive one. What somebody left who was interrupted is called NEW, and
nobody can be at it once the exclusive lock on the store was had.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sandboxd.errors import HostError

NEW = ".new-"
LOCK = "lock"
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SYSTEM = Path("/var/lib/sandboxd")


def system_place(kind: str) -> Path:
    """Where root has it, as /root is closed to the ids that sandboxes have."""
    return _SYSTEM / kind


def own_place(kind: str, variable: str = "XDG_DATA_HOME", default: str = "~/.local/share") -> Path:
    """Where the caller's things of a kind ("images", "builds") are.

    $SANDBOXD_KIND; else for root /var/lib/sandboxd/kind; else sandboxd/kind in the directory that
    `variable` names, or in `default`. HostError if there is no home.
    """
    own = f"SANDBOXD_{kind.upper()}"
    if chosen := os.environ.get(own):
        return Path(os.path.abspath(chosen))
    if os.geteuid() == 0:
        return system_place(kind)
    data = os.environ.get(variable, "")
    home = Path(data) if os.path.isabs(data) else Path(os.path.expanduser(default))
    if not home.is_absolute():
        raise HostError("home", f"no place for {kind}: neither HOME nor {variable} is set",
                        hint=f"{own}=DIR names one")  # fmt: skip
    return home / "sandboxd" / kind


def make(folder: Path, mode: int = 0o755) -> None:
    """The directory with this mode, whatever the umask."""
    folder.mkdir(exist_ok=True)
    folder.chmod(mode)


def write(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    file.chmod(0o644)


def replace(file: Path, data: bytes) -> None:
    """The file has this content from one moment to the next."""
    new = file.with_name(f"{NEW}{file.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        write(new, data)
        new.rename(file)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def opened(folder: Path, more: int = 0) -> Iterator[int]:
    descriptor = os.open(folder, FOLDER | more)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def locked(place: Path, kind: str, inside: tuple[Path, ...], mode: int = 0o755) -> Iterator[int]:
    """The store's lock as a descriptor, on which nothing is locked yet; its folders are there."""
    try:
        for folder in inside:
            if not folder.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
                make(place, mode)
                make(folder, mode)
        lock = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = f"SANDBOXD_{kind.upper()}=DIR names another place"
        raise HostError(kind, f"{place}: {error.strerror}", hint=hint) from error
    try:
        yield lock
    finally:
        os.close(lock)


def hold(folder: Path) -> int | None:
    """A descriptor that keeps a folder from being removed while it is open; None: it is gone."""
    try:
        descriptor = os.open(folder, FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if try_lock(descriptor, fcntl.LOCK_SH):
        return descriptor
    os.close(descriptor)  # who removes it has renamed it already, or will in a moment
    return None


def try_lock(descriptor: int, how: int) -> bool:
    """flock(2) without waiting; whether it is ours now."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove(folder: Path) -> bool:
    """Nobody sees it any more, then it goes; False, and nothing is done, if somebody holds it."""
    try:
        with opened(folder) as descriptor:
            if not try_lock(descriptor, fcntl.LOCK_EX):
                return False
            hidden = folder.with_name(f"{NEW}{folder.name}.{os.urandom(4).hex()}")
            folder.rename(hidden)  # before anybody else can take hold of it by its name
            erase(hidden)
    except FileNotFoundError:
        pass  # somebody else was faster
    return True


def erase(folder: Path) -> None:
    """All of a folder that nobody sees; read-only directories in it do not stop us."""
    with suppress(OSError):
        for above, names, _ in os.walk(folder):
            for name in names:
                inner = os.path.join(above, name)
                if stat.S_ISDIR(os.lstat(inner).st_mode):
                    os.chmod(inner, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
