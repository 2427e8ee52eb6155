"""Where a daemon is: unix:///path, http:// or https://host:port. Both sides use it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandboxd.errors import JobError

DEFAULT_PORT = 8686
LONGEST_PATH = 107
"""sun_path of unix(7), without its NUL."""


@dataclass(frozen=True, slots=True)
class Unix:
    path: Path

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True, slots=True)
class Tcp:
    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.place}"

    @property
    def place(self) -> str:
        """Host and port, as in the Host of a request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse(text: str) -> Unix | Tcp:
    """An address as people write it; JobError if it is none."""
    if text.startswith("unix://"):
        path = text.removeprefix("unix://")
        if not path.startswith("/") or len(os.fsencode(path)) > LONGEST_PATH or "\0" in path:
            raise JobError(
                f"{text!r} is no address",
                hint=f"unix:// and an absolute path of at most {LONGEST_PATH} bytes",
            )
        return Unix(Path(path))
    from urllib.parse import urlsplit  # takes longer than all the rest here

    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise JobError(
            f"{text!r} is no address", hint="unix:///path, or http:// or https://HOST:PORT"
        )
    return Tcp(parts.hostname, DEFAULT_PORT if port is None else port, parts.scheme == "https")


def default(environ: Mapping[str, str]) -> Unix:
    """Where the daemon of this user listens if nobody says otherwise."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return Unix(Path(runtime, "sandboxd", "sandboxd.sock"))
    if os.getuid() == 0:
        return Unix(Path("/run/sandboxd/sandboxd.sock"))
    return Unix(Path(f"/tmp/sandboxd-{os.getuid()}/sandboxd.sock"))


def named(environ: Mapping[str, str]) -> Unix | Tcp:
    """$SANDBOXD_HOST, or the default."""
    text = environ.get("SANDBOXD_HOST", "")
    return parse(text) if text else default(environ)


def token(text: str | None) -> str | None:
    """What a caller has as its token; an empty one is none. JobError if it can be no such."""
    found = (text or "").strip()
    if not found.isascii() or not found.isprintable() or " " in found:
        raise JobError(
            "the token is no token", hint="one word of ASCII, without line breaks: $SANDBOXD_TOKEN"
        )
    return found or None


def state(environ: Mapping[str, str]) -> Path:
    """Where a daemon keeps what it must not forget: systemd's word, or the user's place."""
    if given := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(given)
    home = environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(home):
        return Path(home, "sandboxd", "daemon")
    if os.getuid() == 0:
        return Path("/var/lib/sandboxd/daemon")
    return Path(os.path.expanduser("~/.local/state"), "sandboxd", "daemon")
