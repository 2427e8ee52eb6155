"""A Debian of one's own as an image: mmdebstrap(1) makes it of packages, without root.

It asks the machine's own package sources, through the machine's own proxies. What it makes of them
is a tar archive, which is taken in like any other.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandboxd.errors import HostError, ImageError
from sandboxd.images.importing import Imported, Taking, take
from sandboxd.images.store import Store, check_name
from sandboxd.images.unpacking import Limits, open_unpacker
from sandboxd.plan import IdMap

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_SUITE = re.compile(r"[a-z][a-z0-9-]*")
_APT = Path("/etc/apt")
# How the machine reaches its sources; the rest of its configuration is not the image's business.
_WAY = re.compile(r'Acquire::(?:https?|ftp|tor)::.*"[^"\n]*";|Acquire::Retries "\d+";')
_LINES = 12


VARIANTS = ("minbase", "essential", "apt", "buildd", "important", "standard", "extract", "custom")
"""What there is besides the packages that are named; mmdebstrap(1) says which it is."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is to be in it. `suite` is the machine's own if it is not said."""

    packages: Sequence[str] = ()
    suite: str | None = None
    variant: str = "minbase"


def build(store: Store, name: str, recipe: Recipe, ids: IdMap, limits: Limits) -> Imported:
    """An image of packages. ImageError if mmdebstrap cannot make it, with what it said."""
    check_name(name)
    for package in recipe.packages:
        if not _PACKAGE.fullmatch(package):
            raise ImageError(f"{package!r} is no name of a package")
    program = shutil.which("mmdebstrap")
    if program is None:
        raise HostError("mmdebstrap", "mmdebstrap is not installed",
                        hint="apt-get install mmdebstrap")  # fmt: skip
    with (
        open_unpacker(ids) as unpacker,
        store.importing(unpacker),
        tempfile.TemporaryFile(dir=store.place) as made,
        tempfile.TemporaryDirectory(prefix="sandboxd-", dir=_scratch()) as folder,
    ):
        # mmdebstrap reads it as another user; others cannot list the directory, nor guess the name.
        os.chmod(folder, 0o711)
        way = Path(folder, os.urandom(16).hex())
        way.write_text("".join(f"{line}\n" for line in _way()))
        way.chmod(0o644)
        _run(_words(program, recipe, str(way)), made.fileno())
        made.seek(0)
        (imported,) = take(Taking(store, unpacker, ids, limits), made, name)
        return imported


def _words(program: str, recipe: Recipe, way: str) -> list[str]:
    own = _own_suite()
    wanted = recipe.suite or own
    if wanted is None or not _SUITE.fullmatch(wanted):
        raise ImageError("which Debian?" if wanted is None else f"{wanted!r} is no suite",
                         hint="name one: --suite trixie")  # fmt: skip
    # Its own file of options would stay in the image, and with it this machine's proxies.
    forget = 'rm -f "$1/etc/apt/apt.conf.d/99mmdebstrap"'
    last = "extract" if recipe.variant == "extract" else "customize"  # which has no later one
    return [
        program, "--quiet", f"--variant={recipe.variant}", "--format=tar", f"--aptopt={way}",
        f"--{last}-hook={forget}", "--skip=output/dev",
        *([f"--include={','.join(recipe.packages)}"] if recipe.packages else []),
        wanted, "-", *(_sources() if wanted == own else []),
    ]  # fmt: skip


def _run(words: list[str], output: int) -> None:
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, text=True,
        errors="replace", check=False, env={**os.environ, "TMPDIR": _scratch()}, cwd="/",
    )  # fmt: skip
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-_LINES:])
        raise ImageError(f"mmdebstrap failed:\n{said}")


def _own_suite() -> str | None:
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME")
    except OSError:
        return None


def _sources() -> list[str]:
    """The files that say where this machine has its packages from (sources.list(5))."""
    listed = [_APT / "sources.list", *sorted(_APT.glob("sources.list.d/*"))]
    return [str(one) for one in listed if one.suffix in (".list", ".sources") and _says(one)]


def _says(file: Path) -> bool:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() and not line.lstrip().startswith("#") for line in lines)


def _way() -> Iterator[str]:
    program = shutil.which("apt-config")
    if program is None:
        return
    done = subprocess.run([program, "dump"], capture_output=True, text=True, check=False)
    yield from (line for line in done.stdout.splitlines() if _WAY.fullmatch(line))


def _scratch() -> str:
    """Where the ids of a user namespace get to as well: every directory on the way is open."""
    for place in (os.environ.get("TMPDIR"), "/var/tmp", "/tmp"):
        if place is None:
            continue
        above = [Path(place), *Path(place).parents]
        if all(_is_open(one) for one in above):
            return place
    raise HostError("scratch", "no directory for temporary files that others may enter",
                    hint="TMPDIR=DIR names one")  # fmt: skip


def _is_open(folder: Path) -> bool:
    try:
        return bool(folder.stat().st_mode & stat.S_IXOTH)
    except OSError:
        return False
