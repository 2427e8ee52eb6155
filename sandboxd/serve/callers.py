"""Who is calling: a uid by the kernel's word, or a name by its token. Each sees its jobs only."""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandboxd.errors import HostError
from sandboxd.serve.http import Peer
from sandboxd.serve.wire import NAME, Refusal

SHORTEST = 16
"""Characters of a token."""
LONGEST = 1 << 20
LOCAL = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Caller:
    """`operator`: the daemon's own user, whose power over this machine the daemon has anyway.

    `overseer`: who sees what everybody does, without having power over it.
    """

    name: str
    operator: bool = False
    overseer: bool = False

    @property
    def oversees(self) -> bool:
        return self.operator or self.overseer


@dataclass(frozen=True, slots=True)
class Callers:
    """Who is let in."""

    uids: frozenset[int]
    tokens: Mapping[str, bytes] = field(default_factory=dict)
    """Name -> SHA-256 of its token."""
    certificates: bool = False
    """Whether callers have certificates, so that there may be any number of them."""

    @property
    def many(self) -> bool:
        """Whether there can be more than one."""
        return self.certificates or len(self.uids) + len(self.tokens) > 1

    overseers: frozenset[str] = frozenset()
    """Names of tokens whose callers see everybody's jobs at a glance."""

    def find(self, peer: Peer, headers: Mapping[str, str]) -> Caller:
        """The caller; Refusal 401 or 403 if it is nobody we know."""
        if peer.uid is not None:
            if peer.uid not in self.uids:
                raise Refusal(
                    403,
                    "denied",
                    f"uid {peer.uid} may not use this daemon",
                    hint="who runs it may let you in: sandboxd serve --allow-uid",
                )
            return _of_uid(peer.uid)
        if peer.certificate and not (self.tokens and "authorization" in headers):
            return Caller(f"tls:{peer.certificate}")
        if self.tokens:
            name = self._by_token(headers.get("authorization", ""))
            return Caller(f"token:{name}", overseer=name in self.overseers)
        _check_local(headers)
        return Caller("tcp")

    def _by_token(self, authorization: str) -> str:
        scheme, _, token = authorization.partition(" ")
        digest = hashlib.sha256(token.strip().encode("latin-1")).digest()
        found = None
        for name, known in self.tokens.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        if scheme.lower() != "bearer" or found is None:
            wrong = "no token that is known" if authorization else "no token"
            hint = "Authorization: Bearer TOKEN, of the daemon's --token-file; $SANDBOXD_TOKEN"
            raise Refusal(401, "denied", wrong, hint=hint).with_header("WWW-Authenticate", "Bearer")
        return found


def _check_local(headers: Mapping[str, str]) -> None:
    """Without a token a page in a browser must not reach us, by whatever name (DNS rebinding)."""
    host = headers.get("host", "")
    if "origin" in headers or not LOCAL.fullmatch(host):
        raise Refusal(
            403,
            "denied",
            f"not from a page in a browser, and not as {host!r}",
            hint="without --token-file the Host must be localhost or an address of it",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost is taken as no."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_tokens(path: Path) -> dict[str, bytes]:
    """Lines `NAME TOKEN`; HostError if others could read them, or a line is no such."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(LONGEST).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise HostError("tokens", f"--token-file {path}: {_why(error)}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise HostError(
            "tokens", f"--token-file {path}: others may read or write it", hint=f"chmod 600 {path}"
        )
    found: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, token = line.strip().partition(" ")
        token = token.strip()
        if not re.match(NAME, name) or len(token) < SHORTEST or name in found or " " in token:
            raise HostError(
                "tokens",
                f"--token-file {path}:{number}: not NAME TOKEN",
                hint=f"a new name, a space, and {SHORTEST} characters or more",
            )
        found[name] = hashlib.sha256(token.encode()).digest()
    if not found:
        raise HostError("tokens", f"--token-file {path}: no token in it")
    return found


def _why(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8"


@functools.lru_cache(maxsize=256)
def _of_uid(uid: int) -> Caller:
    return Caller(f"uid:{uid}", operator=uid == os.getuid())
