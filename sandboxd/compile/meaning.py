"""What types cannot say about a policy: values that fit each key and still cannot be meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from sandboxd.compile.pieces import MERGED
from sandboxd.compile.reading import Entries
from sandboxd.compile.rootfs import DIRS, SHELF

Found = tuple[str, str, str]
"""Key, message, what to do."""

# With what would end a line or turn its direction round: a policy is read by people, too.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_OWNED = ("/proc", "/sys")


def problems_of_file(values: Mapping[str, Any]) -> Iterator[Found]:
    """What is wrong with the values of one file, whatever it extends."""
    yield from _texts(values, "")
    yield from _root(values.get("root", {}))
    yield from _environment(values.get("environment", {}))
    yield from _identity(values.get("identity", {}))
    for at, name in _entries(values.get("devices", {}), "allow"):
        if not _is_below(name):
            yield f"devices.allow[{at}]", f"{name!r} is no name below /dev", "e.g. null"
    for at, path in _entries(values, "allow_sources"):
        if path != "/" and not _is_below(path[1:]):
            yield (
                f"allow_sources[{at}]",
                f"{path!r} is not plain",
                "no //, no . and .., no / at the end",
            )
    for at, mount in _entries(values, "mounts"):
        for name, message, hint in _mount(mount):
            yield f"mounts[{at}]{name}", message, hint


def _entries(table: Mapping[str, Any], key: str) -> list[tuple[int, Any]]:
    """The entries of a list with their places in the file."""
    found = table.get(key)
    return found.items if isinstance(found, Entries) else []


def _texts(value: Any, key: str) -> Iterator[Found]:
    """No control characters in anything that becomes a path, a name or a line of a file."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _texts(one, f"{key}.{name}" if key else name)
    elif isinstance(value, Entries):
        for at, one in value.items:
            yield from _texts(one, f"{key}[{at}]")
    elif isinstance(value, str):
        free = key.startswith("environment.set.")
        if "\0" in value or (not free and _CONTROL.search(value)):
            yield key, f"{value!r} contains a control character", "leave it out"


def _root(root: Mapping[str, Any]) -> Iterator[Found]:
    source = root.get("source", "host")
    if source != "host" and not source.startswith("/"):
        hint = '"host", or the absolute path of a directory'
        yield "root.source", f"{source!r} is not absolute", hint
    if source == "/":
        yield "root.source", "a root cannot be the one we are in", '"host" is the machine\'s /usr'
    if root.get("image") and source != "host":
        yield "root.image", "there is a source, too", "a root is one of the two"
    for at, name in _entries(root, "etc"):
        if not _is_below(name):
            yield f"root.etc[{at}]", f"{name!r} is no name below /etc", "e.g. localtime, ssl/certs"
    for at, name in _entries(root, "aliases"):
        if not _is_below(name) or "/" in name or name in (*DIRS, *MERGED, SHELF[1:]):
            yield f"root.aliases[{at}]", f"{name!r} is no free name at the top", "e.g. w"


def _environment(environment: Mapping[str, Any]) -> Iterator[Found]:
    for name in environment.get("set", {}):
        if not name or "=" in name or "\0" in name:
            hint = "names are not empty and have no ="
            yield f"environment.set.{name}", f"{name!r} cannot be set", hint
    for at, name in _entries(environment, "inherit"):
        if not name or "=" in name:
            hint = "names are not empty and have no ="
            yield f"environment.inherit[{at}]", f"{name!r} cannot be inherited", hint


def _identity(identity: Mapping[str, Any]) -> Iterator[Found]:
    home = identity.get("home", "/box")
    if ":" in home:
        yield "identity.home", f"{home!r} contains a colon", "/etc/passwd has no way to say that"


def _is_below(name: str) -> bool:
    return bool(name) and not {"", ".", ".."} & set(name.split("/"))


def _mount(mount: Mapping[str, Any]) -> Iterator[Found]:
    target = mount["target"]
    if target in ("/", "/dev") or f"{target}/".startswith(tuple(f"{one}/" for one in _OWNED)):
        yield ".target", f"nothing can be mounted on {target}", ""
    elif not _is_below(target[1:]):
        yield ".target", f"{target!r} is not plain", "no //, no . and .., no / at the end"
    kind = mount.get("type", "bind")
    yield from _KINDS[kind](mount)
    for name in ("lock", "wait"):
        if kind != "cache" and name in mount:
            yield f".{name}", f"a {kind} has no {name}", 'leave it out, or write type = "cache"'
    if kind in ("bind", "tmpfs") and mount.get("name") is not None:
        yield ".name", f"a {kind} has no name", 'leave it out, or write type = "volume"'


def _tmpfs(mount: Mapping[str, Any]) -> Iterator[Found]:
    for name in ("source", "optional"):
        if mount.get(name):
            yield f".{name}", f"a tmpfs has no {name}", 'leave it out, or write type = "bind"'
    if mount.get("writable") is False:
        yield ".writable", "a read-only tmpfs would be empty for ever", "leave it out"


def _bind(mount: Mapping[str, Any]) -> Iterator[Found]:
    source = mount.get("source")
    if source is None:
        yield "", "a bind without a source", 'name a host path, or write type = "tmpfs"'
    elif not source.startswith("/"):
        yield ".source", f"{source!r} is not absolute", "a policy is not tied to a directory"
    elif ".." in source.split("/"):
        yield ".source", f"{source!r} contains ..", "name the place itself"
    for name in ("size", "inodes"):
        if mount.get(name) is not None:
            yield f".{name}", f"a bind has no {name}", 'leave it out, or write type = "tmpfs"'


def _stored(mount: Mapping[str, Any]) -> Iterator[Found]:
    kind = mount["type"]
    if mount.get("name") is None:
        yield "", f"a {kind} without a name", 'write name = "..."'
    foreign = ("source", "inodes", "optional", "size" if kind == "volume" else "writable")
    for name in foreign:
        if mount.get(name):
            hint = {"size": "it was said when the volume was made",
                    "writable": "lock says who may write"}.get(name, "leave it out")  # fmt: skip
            yield f".{name}", f"a {kind} has no {name}", hint


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Found]]] = MappingProxyType(
    {"bind": _bind, "tmpfs": _tmpfs, "volume": _stored, "cache": _stored}
)
