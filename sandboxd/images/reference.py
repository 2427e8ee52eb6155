"""Names of images in registries, [HOST[:PORT]/]PATH[:TAG][@DIGEST], and who may see them."""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import msgspec

from sandboxd.errors import ImageError

_PATH = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_MOST_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Reference:
    """Where an image is."""

    host: str
    """With its port, as it was written."""
    path: str
    tag: str
    """A tag or a digest."""

    @property
    def url(self) -> str:
        """Of the registry's API. Plain HTTP is spoken with this machine only."""
        return f"{'http' if is_loopback(self.host) else 'https'}://{self.host}/v2/"


def parse(text: str) -> Reference:
    """ImageError unless it names a registry and an image in it."""
    name, at, digest = text.partition("@")
    host, slash, path = name.partition("/")
    if not slash or not ({*".:"} & {*host} or host == "localhost"):
        raise ImageError(f"{text!r} names no registry",
                         hint="HOST/PATH:TAG, e.g. registry.example.org/debian:13")  # fmt: skip
    path, colon, tag = path.partition(":")
    tag = digest if at else tag if colon else "latest"
    right = _DIGEST.fullmatch(tag) if at else _TAG.fullmatch(tag)
    if not right or not _PATH.fullmatch(path) or not _HOST.fullmatch(host):
        raise ImageError(
            f"{text!r} is not HOST[:PORT]/PATH[:TAG] or HOST[:PORT]/PATH@sha256:DIGITS"
        )
    return Reference(host, path, tag)


def is_loopback(host: str) -> bool:
    """Whether this is a name of this machine for itself."""
    bare = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if bare == "localhost":
        return True
    try:
        return ip_address(bare.strip("[]")).is_loopback
    except ValueError:
        return False


# -- credentials -------------------------------------------------------------------------------


class _Auth(msgspec.Struct, frozen=True):
    auth: str = ""


class _AuthFile(msgspec.Struct, frozen=True):
    auths: dict[str, _Auth] = {}


def credentials(host: str) -> str | None:
    """ "user:password" for a registry, as podman login and docker login wrote it down.

    Looked for in $REGISTRY_AUTH_FILE, $XDG_RUNTIME_DIR/containers/auth.json and
    ~/.docker/config.json (containers-auth.json(5)); credential helpers are not asked.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    files = [os.environ.get("REGISTRY_AUTH_FILE"), runtime and f"{runtime}/containers/auth.json",
             os.path.expanduser("~/.docker/config.json")]  # fmt: skip
    for file in filter(None, files):
        try:
            with Path(file).open("rb") as stream:
                found = msgspec.json.decode(stream.read(_MOST_FILE), type=_AuthFile)
            entry = found.auths.get(host) or _Auth()
            if entry.auth:
                return base64.b64decode(entry.auth, validate=True).decode()
        except (OSError, msgspec.DecodeError, binascii.Error, UnicodeDecodeError):
            continue
    return None
