"""What a build's root and mounts are made of, in a few words that change when they do.

For an image its id and layers: digests of all that is in it. For the host's own directories, or a
directory that is the root, there is no digest, and reading all of /usr would take longer than any
compiler. What is taken instead:

- the databases of the package managers (dpkg, rpm, pacman, apk): size, inode and time of change. No
  package comes, goes or changes without them;
- the same of the directories of programs and libraries (BELOW, DEEPER): their time of change moves
  when a name in them comes, goes or is replaced, also without a package manager;
- the places in /etc that the policy shows;
- the program that is run, through its links: inode, size and time of change (ctime).

What is not seen: a file that is written over in place, or replaced deeper down, by hand; that is
what `salt` is for, or an empty store. A read-only bind is looked at whole, name by name, up to MOST
entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from sandboxd.compile.build import candidates
from sandboxd.compile.pieces import of_host
from sandboxd.errors import JobError
from sandboxd.host import Host
from sandboxd.policy import Mount, Policy

PACKAGES = (
    "var/lib/dpkg/status", "var/lib/rpm/rpmdb.sqlite", "usr/lib/sysimage/rpm/rpmdb.sqlite",
    "var/lib/rpm/Packages", "var/lib/pacman/local", "lib/apk/db/installed",
)  # fmt: skip
BELOW = ("usr", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "usr/lib32", "usr/libexec",
         "usr/include", "usr/local", "usr/local/bin", "usr/local/lib", "usr/local/include",
         "usr/share", "opt", "etc/alternatives")  # fmt: skip
DEEPER = ("usr/lib", "usr/lib64", "usr/libexec", "usr/local", "usr/local/lib")
"""Of these the directories in them, too."""
MOST = 100_000
_FIRST_CPU = 8192

Words = tuple[object, ...]


def identity(policy: Policy, host: Host, program: bytes, path: bytes) -> Words:
    """Of the root that a policy gives, for who runs this program with this PATH."""
    if policy.root.image:
        image = host.image
        return ("image", image.id, image.layers) if image is not None else ("image",)
    top = "/" if of_host(policy) else policy.root.source
    etc = [f"etc/{name}" for name in policy.root.etc]
    named = [os.path.join(top, name) for name in (*PACKAGES, *BELOW, *etc)]
    inner = [folder for name in DEEPER for folder in _folders(os.path.join(top, name))]
    tried = [_below(top, one) for one in candidates(program, path) if one.startswith(b"/")]
    return ("directory", top, *(_facts(one) for one in (*named, *inner)), *map(_facts, tried))


def processor() -> list[str]:
    """What compilers ask of the first CPU (-march=native): a store may be on several machines."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = file.read(_FIRST_CPU).partition("\n\n")[0].splitlines()
    except OSError:
        return []
    told = ("model", "flags", "features", "cpu ")
    return [line for line in lines if line.lower().startswith(told) and "MHz" not in line]


def mounted(policy: Policy) -> Iterator[Words]:
    """What the mounts of a policy show. JobError if more than that decided over a build."""
    for number, mount in enumerate(policy.mounts):
        if mount.type == "tmpfs":
            continue
        where = policy.origin(f"mounts[{number}]")
        if mount.type != "bind" or mount.writable:
            raise JobError(
                f"{where}: a build cannot have {mount.target}: what can be written to by others is "
                "no input that a key could name",
                hint="show a directory read-only, give it as files, or use run",
            )
        yield (mount.target, *_tree(mount, where))


def _tree(mount: Mount, where: str) -> Iterator[object]:
    source = mount.source or ""
    yield _facts(source)
    count = 0
    for above, folders, files in os.walk(source):
        folders.sort()
        for name in sorted((*folders, *files)):
            count += 1
            if count > MOST:
                raise JobError(f"{where}: {source} has more than {MOST} entries: too many to look "
                               "at for each build", hint="show less of it, or use run")  # fmt: skip
            path = os.path.join(above, name)
            yield os.fsencode(path), _facts(path)


def _folders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return sorted(one.path for one in found if one.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _below(top: str, path: bytes) -> str:
    return os.path.join(top, os.fsdecode(path).lstrip("/"))


def _facts(path: str) -> Words:
    """What the kernel says about what is there, behind links; nothing if there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_ctime_ns
