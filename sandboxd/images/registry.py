"""A registry's API (OCI distribution specification), as much of it as pulling takes.

A layer goes from the connection straight into the unpacker; only what is not there is fetched. All
that comes is held against the digest that named it, and only the first manifest has none, unless
the reference is one. Credentials go to the registry and to the token server it names, over TLS, and
to nobody that either of them redirects to.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from sandboxd.errors import ImageError
from sandboxd.images import manifests
from sandboxd.images.archive import Read
from sandboxd.images.importing import Imported, Readers, Taking, take
from sandboxd.images.manifests import INDEXES, MANIFESTS, MOST_JSON, Descriptor, Index, Manifest
from sandboxd.images.records import decode
from sandboxd.images.reference import Reference, credentials, is_loopback, parse
from sandboxd.images.store import Store, check_name
from sandboxd.images.unpacking import Limits, open_unpacker
from sandboxd.plan import IdMap
from sandboxd.stores.folders import NEW

TIMEOUT = 60.0
"""Seconds without a byte."""
_ACCEPT = ", ".join(sorted(INDEXES | MANIFESTS))
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


def pull(store: Store, text: str, name: str | None, ids: IdMap, limits: Limits) -> Imported:
    """An image from the registry that its reference names. ImageError if it cannot be had."""
    reference = parse(text)
    name = check_name(name if name is not None else text.partition("@")[0])
    registry = Registry(reference)
    with open_unpacker(ids) as unpacker, store.importing(unpacker):
        image, sizes = registry.image()
        taking = Taking(store, unpacker, ids, limits)
        return taking.image(image, (name,), text, registry.readers(sizes))


class Registry:
    """One image in one registry."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._login = credentials(reference.host)
        self._authorization = ""
        self._opener = urllib.request.build_opener(_NoDowngrade())

    def image(self) -> tuple[manifests.Found, tuple[Descriptor, ...]]:
        """What the image consists of; as yet there is no layer."""
        tag = self._reference.tag
        wanted = tag if ":" in tag else None
        data, kind = self._manifest(tag, wanted)
        for _ in range(3):
            if kind not in INDEXES:
                break
            chosen = manifests.choose(decode(data, Index, "the registry's index"))
            if not chosen:
                raise ImageError("an index without an image")
            data, kind = self._manifest(chosen[0].digest, chosen[0].digest)
        manifest = decode(data, Manifest, "the registry's manifest")
        config = self._blob(manifest.config)
        return manifests.of_manifest(manifest, config, ()), manifest.layers

    def readers(self, layers: tuple[Descriptor, ...]) -> Readers:
        """For each layer what opens it."""
        for one in layers:
            yield lambda one=one: self._reader(one)  # type: ignore[misc]

    def _manifest(self, tag: str, digest: str | None) -> tuple[bytes, str]:
        with self._get(f"{self._reference.path}/manifests/{tag}", _ACCEPT) as response:
            data = response.read(MOST_JSON + 1)
            kind = (response.headers.get("Content-Type") or "").partition(";")[0].strip()
        if len(data) > MOST_JSON:
            raise ImageError(f"a manifest of more than {MOST_JSON} bytes")
        manifests.check_digest(data, digest, "the manifest")
        return data, kind

    def _blob(self, one: Descriptor) -> bytes:
        with self._reader(one) as read:
            data = b""
            while len(data) <= MOST_JSON and (piece := read(MOST_JSON)):
                data += piece
        if len(data) > MOST_JSON:
            raise ImageError(f"a configuration of more than {MOST_JSON} bytes")
        manifests.check_digest(data, one.digest, "the configuration")
        return data

    @contextmanager
    def _reader(self, one: Descriptor) -> Iterator[Read]:
        manifests.blob(one.digest)  # it is one
        if one.size < 0:
            raise ImageError("the manifest does not say how large its parts are")
        left = one.size

        def read(count: int) -> bytes:
            nonlocal left
            try:
                data: bytes = response.read(min(count, left))
            except (OSError, http.client.HTTPException) as error:
                hint = "try again: layers that came whole are kept"
                raise ImageError(f"{self._reference.host}: {error}", hint=hint) from error
            left -= len(data)
            return data

        with self._get(f"{self._reference.path}/blobs/{one.digest}", "*/*") as response:
            yield read

    # -- requests

    def _get(self, path: str, accept: str) -> http.client.HTTPResponse:
        """One that is answered; asked for a token it comes again with one."""
        url = self._reference.url + path
        for attempt in range(2):
            request = urllib.request.Request(url, headers={"Accept": accept})
            if self._authorization:
                request.add_unredirected_header("Authorization", self._authorization)
            try:
                return self._open(request)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code != 401 or attempt:
                        raise self._refused(error.code, error.reason) from error
                    self._authorize(error.headers.get("WWW-Authenticate") or "")
        raise AssertionError

    def _open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        try:
            found: http.client.HTTPResponse = self._opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            hint = "is the registry's name right, and reachable?"
            raise ImageError(f"{self._reference.host}: {reason}", hint=hint) from error
        return found

    def _refused(self, status: int, reason: str) -> ImageError:
        hint = {401: "log in: podman login, or docker login", 404: "is the name right?",
                403: "log in: podman login, or docker login"}.get(status, "")  # fmt: skip
        said = self._reference
        return ImageError(f"{said.host} has no {said.path}:{said.tag} for us: {status} {reason}",
                          hint=hint)  # fmt: skip

    def _authorize(self, challenge: str) -> None:
        scheme, _, rest = challenge.partition(" ")
        said = dict(_CHALLENGE.findall(rest))
        if scheme.lower() == "basic" and self._login is not None:
            self._authorization = _basic(self._login)
        elif scheme.lower() == "bearer" and "realm" in said:
            self._authorization = f"Bearer {self._token(said)}"
        else:
            raise self._refused(401, "Unauthorized")

    def _token(self, said: dict[str, str]) -> str:
        """From whom the registry names (distribution's token authentication)."""
        realm = urllib.parse.urlsplit(said["realm"])
        local = is_loopback(self._reference.host) and is_loopback(realm.netloc)
        if realm.scheme != "https" and not (realm.scheme == "http" and local):
            raise ImageError(f"{self._reference.host} wants a token of {said['realm'][:200]!r}",
                             hint="only https is spoken there")  # fmt: skip
        query: dict[str, str] = {name: said[name] for name in ("service", "scope") if name in said}
        query.setdefault("scope", f"repository:{self._reference.path}:pull")
        request = urllib.request.Request(f"{said['realm']}?{urllib.parse.urlencode(query)}")
        if self._login is not None:
            request.add_unredirected_header("Authorization", _basic(self._login))
        try:
            with self._open(request) as response:
                found = decode(response.read(MOST_JSON), _Token, "the answer of the token server")
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.reason) from error
        return found.token or found.access_token


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Blobs often lie elsewhere; but what began under TLS stays under TLS."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]  # noqa: ANN
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError("redirected from https to something else")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _basic(login: str) -> str:
    return f"Basic {base64.b64encode(login.encode()).decode()}"


# -- skopeo --------------------------------------------------------------------------------------


def pull_by_skopeo(
    skopeo: str, store: Store, text: str, name: str | None, ids: IdMap, limits: Limits
) -> Imported:
    """The same by skopeo(1), which knows mirrors, credential helpers and signature policies."""
    reference = parse(text)
    name = check_name(name if name is not None else text.partition("@")[0])
    with (
        open_unpacker(ids) as unpacker,
        store.importing(unpacker),
        tempfile.TemporaryDirectory(prefix=NEW, dir=store.place / "layers") as scratch,
    ):
        where = os.path.join(scratch, "layout")
        words = [skopeo, "copy", "--quiet", "--preserve-digests"]
        if is_loopback(reference.host):
            words.append("--src-tls-verify=false")
        done = subprocess.run(
            [*words, f"docker://{text}", f"oci:{where}:pulled"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().rpartition("msg=")[2].strip('"')
            raise ImageError(f"skopeo could not copy {text}: {said[:500]}")
        (imported,) = take(Taking(store, unpacker, ids, limits), where, name)
        return imported
