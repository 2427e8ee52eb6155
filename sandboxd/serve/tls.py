"""TLS on TCP: what a daemon shows and asks for, and whom a client believes. Standard library only.

`ssl` is loaded when it is needed: the shell's clients start often, and mostly on a Unix socket.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd.errors import HostError

if TYPE_CHECKING:
    import ssl

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}")
"""Of a caller, in its certificate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a daemon shows, and whose certificates it asks callers for; None: for none."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom a client believes (None: whom the system does), and what it shows if it is asked."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def named(cls, environ: Mapping[str, str]) -> Trust:
        """$SANDBOXD_TLS_CA, $SANDBOXD_TLS_CERT and $SANDBOXD_TLS_KEY."""
        found = {
            name: environ.get(f"SANDBOXD_TLS_{name.upper()}") for name in ("ca", "cert", "key")
        }
        return cls(**{name: Path(value) for name, value in found.items() if value})


def of_daemon(shown: Shown) -> ssl.SSLContext:
    """TLS 1.2 or newer. HostError if the files are no such, or others may read the key."""
    import ssl

    try:
        if shown.key.stat().st_mode & 0o077:
            raise HostError(
                "tls", f"{shown.key}: others may read or write it", hint=f"chmod 600 {shown.key}"
            )
        found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        found.minimum_version = ssl.TLSVersion.TLSv1_2
        found.load_cert_chain(shown.cert, shown.key)
        if shown.client_ca is not None:
            found.load_verify_locations(shown.client_ca)
            found.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        files = ", ".join(str(one) for one in (shown.cert, shown.key, shown.client_ca) if one)
        raise _wrong(files, error) from None
    return found


def of_client(trust: Trust) -> ssl.SSLContext:
    """Checks the daemon's name. HostError if the files are no such."""
    import ssl

    try:
        found = ssl.create_default_context(cafile=trust.ca)
        if trust.cert is not None:
            found.load_cert_chain(trust.cert, trust.key)
    except OSError as error:
        files = ", ".join(str(one) for one in (trust.ca, trust.cert, trust.key) if one)
        raise _wrong(files, error) from None
    return found


def _wrong(files: str, error: OSError) -> HostError:
    reason = getattr(error, "reason", None) or (error.strerror if error.errno else str(error))
    return HostError("tls", f"{files}: {reason}", hint="PEM files: a chain, its key, authorities")


def name_of(certificate: Mapping[str, Any], whole: bytes) -> str:
    """A caller by its certificate: the common name, else the SHA-256 of all of it.

    `certificate` is as SSLSocket.getpeercert gives it, and has been verified.
    """
    pairs = [pair for part in certificate.get("subject", ()) for pair in part]
    names = [value for key, value in pairs if key == "commonName"]
    if len(names) == 1 and NAME.fullmatch(names[0]):
        return str(names[0])
    return hashlib.sha256(whole).hexdigest()
