"""-v, --mount and --tmpfs of the command line, as docker run writes them -> Mount."""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sandboxd.cli.quantities import count, size, time

if TYPE_CHECKING:
    from sandboxd.policy import Mount

VOLUME_FORM = "SRC:DST[:ro], e.g. ./data:/data:ro, or NAME:DST[:ro] for a volume"
MOUNT_FORM = (
    "type=bind|volume,source=SRC,target=DST[,readonly], type=tmpfs,target=DST[,size=64M] or "
    "type=cache,source=NAME,target=DST[,lock=exclusive|shared-ro|copy]"
)
TMPFS_FORM = "DST[:size=64M,noexec]"


def volume(text: str) -> Mount:
    """-v SRC:DST[:OPTIONS]; writable unless it says ro, and SRC without a slash a volume's name."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise _wrong(text, f"{VOLUME_FORM}; for a path with a colon there is --mount")
    kind = "bind" if "/" in parts[0] or parts[0] in (".", "..") else "volume"
    found = {"source": parts[0], "target": target(parts[1])}
    return _mount(kind, found | _options(",".join(parts[2:]).split(","), text), text)


def mount(text: str) -> Mount:
    """--mount KEY=VALUE,...: a line of CSV, so that a value with a comma can be quoted."""
    import csv

    try:
        (words,) = csv.reader([text], strict=True)
    except (csv.Error, ValueError):
        raise _wrong(text, MOUNT_FORM) from None
    found = _options(words, text)
    kind = found.pop("type", "bind")
    if kind not in _FOREIGN:
        there = ", ".join(f"type={one}" for one in _FOREIGN)
        raise argparse.ArgumentTypeError(f"type={kind}: there are {there}")
    if "target" not in found or (kind != "tmpfs") != ("source" in found):
        raise _wrong(text, MOUNT_FORM)
    return _mount(kind, found, text)


def tmpfs(text: str) -> Mount:
    """--tmpfs DST[:OPTIONS]."""
    where, _, options = text.partition(":")
    return _mount("tmpfs", {"target": target(where)} | _options(options.split(","), text), text)


def source(text: str) -> str:
    """A host path, absolute: what is relative is relative to where the command was typed."""
    return _text(os.path.abspath(text))


def target(text: str) -> str:
    """A place in the sandbox."""
    path = posixpath.normpath("/" + text.lstrip("/"))
    if not text.startswith("/") or ".." in text.split("/"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no place in the sandbox: it must be absolute and without .., "
            f"e.g. /box/{posixpath.basename(path)}"
        )
    if path in ("/", "/dev") or (path + "/").startswith(("/proc/", "/sys/")):
        raise argparse.ArgumentTypeError(f"nothing can be mounted on {path}")
    return _text(path)


def _text(path: str) -> str:
    """A policy is text, so a path in one has to be."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{path!r} is not UTF-8: name it through a link") from None
    return path


_SWITCHES: Mapping[str, tuple[str, bool]] = MappingProxyType(
    {
        "ro": ("writable", False),
        "readonly": ("writable", False),
        "rw": ("writable", True),
        "exec": ("exec", True),
        "noexec": ("exec", False),
        "optional": ("optional", True),
    }
)
_TRUTH: Mapping[str, bool] = MappingProxyType(
    {"": True, "true": True, "1": True, "false": False, "0": False}
)
_ALWAYS = frozenset({"nosuid", "nodev"})
_VALUES: Mapping[str, tuple[str, Callable[[str], Any]]] = MappingProxyType(
    {
        "type": ("type", str),
        "lock": ("lock", str),
        "wait": ("wait", time),
        "source": ("source", str),
        "src": ("source", str),
        "target": ("target", target),
        "destination": ("target", target),
        "dst": ("target", target),
        "size": ("size", size),
        "tmpfs-size": ("size", size),
        "inodes": ("inodes", count),
        "nr_inodes": ("inodes", count),
    }
)


def _options(words: Sequence[str], text: str) -> dict[str, Any]:
    """KEY=VALUE and switches as fields of a Mount."""
    found: dict[str, Any] = {}
    for word in filter(None, words):
        key, _, value = word.partition("=")
        if key in _SWITCHES and value in _TRUTH:
            name, meaning = _SWITCHES[key]
            found[name] = meaning == _TRUTH[value]
        elif key in _VALUES and value:
            name, read = _VALUES[key]
            found[name] = read(value)
        elif key not in _ALWAYS:
            raise argparse.ArgumentTypeError(
                f"{text!r}: no such option of a mount: {word} (there are: "
                f"{', '.join(sorted({*_SWITCHES, *_VALUES}))})"
            )
    return found


_FOREIGN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bind": ("size", "inodes", "lock", "wait"),
        "tmpfs": ("source", "optional", "lock", "wait"),
        "volume": ("size", "inodes", "optional", "lock", "wait"),
        "cache": ("inodes", "optional", "writable"),
    }
)
"""Kind of a mount -> options that it has not."""
_LOCKS = ("exclusive", "shared-ro", "copy")


def _mount(kind: str, found: dict[str, Any], text: str) -> Mount:
    for name in _FOREIGN[kind]:
        if name in found:
            raise argparse.ArgumentTypeError(f"{text!r}: a {kind} mount has no {name}")
    if kind == "tmpfs" and not found.get("writable", True):
        raise argparse.ArgumentTypeError(f"{text!r}: a read-only tmpfs would be empty for ever")
    if found.get("lock", _LOCKS[0]) not in _LOCKS:
        raise argparse.ArgumentTypeError(f"{text!r}: lock is one of {', '.join(_LOCKS)}")
    if kind == "bind":
        found["source"] = source(found["source"])
    elif kind in ("volume", "cache"):
        found["name"] = _name(found.pop("source"), kind)
    writable = {} if kind == "cache" else {"writable": True}
    from sandboxd.policy import Mount

    return Mount(**({"type": kind} | writable | found))


def _name(text: str, kind: str) -> str:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text):
        hint = f"for the directory write ./{text}" if kind == "volume" else "letters, digits, _.-"
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a {kind}: {hint}")
    return text


def _wrong(text: str, form: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{text!r} is not {form}")
