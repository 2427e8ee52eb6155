"""`mounts` of a bundle: its own files and memory are granted, nothing of the host is."""

from __future__ import annotations

import posixpath
import re
from types import MappingProxyType

from sandboxd.compile.document import Node
from sandboxd.compile.granted import Granted
from sandboxd.policy import Mount

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_SIZE = re.compile(r"([0-9]{1,15})([kmg]?)", re.IGNORECASE)
_UNITS = MappingProxyType({"": 0, "k": 10, "m": 20, "g": 30})
_NOTHING_LOST = frozenset(
    {
        *("async", "atime", "defaults", "diratime", "iversion", "lazytime", "loud", "noatime"),
        *("nodev", "nodiratime", "noiversion", "nolazytime", "nomand", "norelatime"),
        *("nostrictatime", "nosuid", "private", "relatime", "rprivate", "rslave", "rw", "silent"),
        *("slave", "strictatime", "symfollow", "bind", "rbind", "ro", "rro", "noexec", "rnoexec"),
        *("exec", "rnosuid", "rnodev", "newinstance", "mode=1777"),
    }
)
"""Options that are kept to, or that only say how times are written."""
_OURS = frozenset({"/dev", "/tmp"})
"""Where a tmpfs is mounted in every sandbox."""
_ABSENT = MappingProxyType(
    {
        "devpts": "there is no /dev/pts: programs make no terminals",
        "mqueue": "message queues are there, a file system that shows them is not",
        "sysfs": "there is no /sys",
        "cgroup": "no cgroups are shown",
        "cgroup2": "no cgroups are shown",
    }
)


def mounts(top: Node, granted: Granted) -> None:
    """Each of them; without a proc there is none."""
    procs = False
    for node in top.entries("mounts"):
        target, kind = _target(node), _kind(node)
        if target in granted.around.shown:
            continue
        if kind == "proc" and target == "/proc":
            procs = True
            _options(node, granted)
        elif kind in _ABSENT:
            granted.ignore(node, _ABSENT[kind])
        elif kind not in ("tmpfs", "bind"):
            granted.ignore(node, f"no {kind} is mounted for a bundle" if kind else "of no type")
        elif f"{target}/".startswith(("/proc/", "/sys/")) or target == "/":
            granted.ignore(node, f"nothing is mounted on {target}")
        elif any(one.target == target for one in granted.policy.mounts):
            granted.ignore(node, f"{granted.policy.name} mounts something there")
        else:
            (_tmpfs if kind == "tmpfs" else _bind)(node, target, granted)
    if not procs:
        granted.set("root", "proc", "none", top.below("mounts"))


def _target(node: Node) -> str:
    place = node.need("destination")
    if ".." in place.text.split("/"):
        raise place.wrong(f"{place.text!r} contains ..", hint="name the place itself")
    return _plain(place, posixpath.normpath(f"/{place.text.lstrip('/')}"))


def _plain(node: Node, text: str) -> str:
    if _CONTROL.search(text):
        raise node.wrong(f"{text!r} contains a control character")
    return text


def _kind(node: Node) -> str:
    bound = {"bind", "rbind"}.intersection(node.texts("options"))
    found = node.get("type")
    return "bind" if bound or found is None else found.text


def _options(node: Node, granted: Granted, *known: str) -> None:
    """Tells of options that nothing is done about."""
    for option in node.entries("options"):
        if option.text not in _NOTHING_LOST and option.text.partition("=")[0] not in known:
            granted.ignore(option, f"{option.text} is not kept to")
    granted.ignore_all(node, {}, "destination", "type", "source", "options")


def _add(granted: Granted, mount: Mount) -> None:
    """A later one hides an earlier one on the same place."""
    granted.mounts = [one for one in granted.mounts if one.target != mount.target]
    granted.mounts.append(mount)


def _tmpfs(node: Node, target: str, granted: Granted) -> None:
    if target in _OURS:
        return
    options = node.texts("options")
    _options(node, granted, "size", "nr_inodes")
    size, inodes = (_size(node, name, granted) for name in ("size", "nr_inodes"))
    if "ro" in options:
        granted.ignore(node, "a tmpfs can be written to")
    if size is not None and granted.policy.limits.disk is not None:
        size = min(size, granted.policy.limits.disk)
    if size is None and inodes is not None:
        granted.ignore(node, "nr_inodes counts with a size only")
        inodes = None
    _add(granted, Mount(target=target, type="tmpfs", writable=True, size=size, inodes=inodes,
                        exec="noexec" not in options))  # fmt: skip


def _size(node: Node, name: str, granted: Granted) -> int | None:
    for option in node.entries("options"):
        key, equals, text = option.text.partition("=")
        if key == name and equals:
            found = _SIZE.fullmatch(text)
            if found and int(found[1]):
                return int(found[1]) << _UNITS[found[2].lower()]
            granted.ignore(option, "no number above 0")
    return None


def _bind(node: Node, target: str, granted: Granted) -> None:
    source = node.need("source")
    options = set(node.texts("options"))
    read_only = bool(options & {"ro", "rro"})
    name = _plain(source, source.text)
    by_hand = f"-v {name}:{target}{':ro' * read_only} on the command line"
    real = granted.around.resolve(name)
    if real is None:
        granted.ignore(node, f"a bundle shows nothing of the host; {by_hand} does")
        return
    _plain(source, real)
    if not read_only:
        granted.ignore(node, f"it is shown read-only; {by_hand} lets it be written to")
    _options(node, granted)
    runs = not options & {"noexec", "rnoexec"}
    _add(granted, Mount(target=target, source=real, exec=runs))
