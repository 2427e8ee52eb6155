"""Pulling: from Debian's docker-registry on loopback, by sandboxd's own client and by skopeo."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandboxd.errors import ImageError
from sandboxd.images import debian, registry
from sandboxd.images.debian import Recipe
from sandboxd.images.importing import Imported
from sandboxd.images.reference import credentials, is_loopback, parse
from sandboxd.images.store import Store
from sandboxd.images.unpacking import Limits
from tests.images import making
from tests.images.making import END, SMALL, file, folder, ids, oci_layout

REGISTRY = pytest.mark.needs("docker-registry", "userns")
LAYERS = [folder(b"etc") + file(b"etc/a") + END, file(b"b", os.urandom(300_000)) + END]
CONFIG: dict[str, object] = {"Cmd": ["/b"]}
# "someone" with the password "sesame", as htpasswd -B writes it.
HTPASSWD = "someone:$2y$05$abcdefghijklmnopqrstuuKcS.CYWVYVaLiiCKrrc0A5s3mGesJ9O\n"
LOGIN = "someone:sesame"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Store]:
    with making.store(tmp_path / "store") as found:
        yield found


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials, and no proxy, of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("REGISTRY_AUTH_FILE", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def running(top: Path, *, login: bool = False) -> Iterator[str]:
    """docker-registry with an empty store of its own -> HOST:PORT."""
    top.mkdir()
    (top / "htpasswd").write_text(HTPASSWD)
    auth = f"auth: {{htpasswd: {{realm: test, path: {top}/htpasswd}}}}\n" if login else ""
    (top / "config.yml").write_text(
        "version: 0.1\nlog: {level: info}\nhttp: {addr: '127.0.0.1:0'}\n"
        f"storage: {{filesystem: {{rootdirectory: {top}/data}}}}\n{auth}"
    )
    process = subprocess.Popen(
        ["docker-registry", "serve", str(top / "config.yml")],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"listening on (127\.0\.0\.1:\d+)", line):
                    drain = threading.Thread(target=process.stderr.read)
                    drain.start()
                    yield found[1]
                    process.kill()
                    drain.join()
                    return
            pytest.fail("docker-registry did not start")
        finally:
            process.kill()


def request(url: str, method: str, data: bytes = b"", **headers: str) -> str:
    """Returns the Location that is answered."""
    login = base64.b64encode(LOGIN.encode()).decode()
    said = {"Authorization": f"Basic {login}"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    asked = urllib.request.Request(url, data=data, method=method, headers=said)
    with urllib.request.urlopen(asked, timeout=20) as response:
        return str(response.headers.get("Location") or "")


def push(host: str, layout: Path, path: str, tag: str) -> str:
    """An OCI layout's one image into a registry; returns the digest of its manifest."""
    manifest = json.loads((layout / "index.json").read_text())["manifests"][0]
    data = (layout / "blobs/sha256" / manifest["digest"][7:]).read_bytes()
    parts = json.loads(data)
    for part in (parts["config"], *parts["layers"]):
        where = request(f"http://{host}/v2/{path}/blobs/uploads/", "POST")
        blob = (layout / "blobs/sha256" / part["digest"][7:]).read_bytes()
        request(f"{where}&digest={part['digest']}", "PUT", blob,
                Content_Type="application/octet-stream")  # fmt: skip
    request(f"http://{host}/v2/{path}/manifests/{tag}", "PUT", data,
            Content_Type=manifest["mediaType"])  # fmt: skip
    return str(manifest["digest"])


def pull(place: Store, reference: str) -> Imported:
    return registry.pull(place, reference, None, ids(), SMALL)


@REGISTRY
def test_pulling_from_a_registry(place: Store, tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, CONFIG)
    with running(tmp_path / "registry") as host:
        digest = push(host, layout, "some/fruit", "1")
        first = pull(place, f"{host}/some/fruit:1")
        assert (first.new, first.record.config.cmd) == (2, ("/b",))
        again = pull(place, f"{host}/some/fruit@{digest}")
        assert (again.new, again.record.id) == (0, first.record.id)
        names = {f"{host}/some/fruit", f"{host}/some/fruit:1"}
        assert {one.name for one in place.images()} == names
        with pytest.raises(ImageError, match="has no some/fruit:2 for us: 404"):
            pull(place, f"{host}/some/fruit:2")
        # Another image with one layer in common: only the other one is fetched.
        other = oci_layout(tmp_path / "other", [LAYERS[0], file(b"c") + END])
        push(host, other, "some/tree", "1")
        assert pull(place, f"{host}/some/tree:1").new == 1


@REGISTRY
@pytest.mark.needs("mmdebstrap", "subuid", "packages")
def test_debian_goes_to_a_registry_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made of packages by build-debian; its archive pushed; pulled into another store, and run."""
    made = tmp_path / "made.tar"
    real = debian._run

    def kept(words: list[str], output: int) -> None:
        """mmdebstrap as it is; what it wrote is kept, for build-debian takes it in and no more."""
        real(words, output)
        made.write_bytes(os.pread(output, os.fstat(output).st_size, 0))

    monkeypatch.setattr(debian, "_run", kept)
    recipe = Recipe(["busybox-static"], variant="extract")
    with making.store(tmp_path / "first") as first:
        built = debian.build(first, "lab", recipe, ids(), Limits())
    layout = oci_layout(tmp_path / "layout", [made.read_bytes()], {"Cmd": ["/bin/busybox"]})
    with running(tmp_path / "registry") as host, making.store(tmp_path / "second") as second:
        push(host, layout, "debian/lab", "1")
        pulled = registry.pull(second, f"{host}/debian/lab:1", "lab", ids(), Limits())
        assert pulled.record.layers == built.record.layers
        argv = [sys.executable, "-P", "-m", "sandboxd", "run", "-q", "--image", "lab", "--"]
        done = subprocess.run(
            [*argv, "/bin/busybox", "cat", "/usr/share/doc/busybox-static/copyright"],
            env=os.environ | {"SANDBOXD_IMAGES": str(tmp_path / "second")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert "busybox" in done.stdout.lower(), done.stderr


@REGISTRY
@pytest.mark.needs("skopeo")
def test_pulling_by_skopeo_makes_the_same(place: Store, tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, CONFIG)
    with running(tmp_path / "registry") as host:
        push(host, layout, "fruit", "1")
        own = pull(place, f"{host}/fruit:1")
        what = (place, f"{host}/fruit:1", "again", ids(), SMALL)
        other = registry.pull_by_skopeo("skopeo", *what)
        assert (other.record.id, other.record.layers) == (own.record.id, own.record.layers)
        assert other.record.name == "again"
        with pytest.raises(ImageError, match="skopeo could not copy"):
            registry.pull_by_skopeo("skopeo", place, f"{host}/none:1", None, ids(), SMALL)
    assert len(os.listdir(place.place / "layers")) == 2


@REGISTRY
def test_a_registry_that_wants_a_password(
    place: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, CONFIG)
    with running(tmp_path / "registry", login=True) as host:
        push(host, layout, "fruit", "1")
        with pytest.raises(ImageError, match=r"401 .*log in"):
            pull(place, f"{host}/fruit:1")
        auth = base64.b64encode(LOGIN.encode()).decode()
        (tmp_path / "auth.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
        assert pull(place, f"{host}/fruit:1").new == 2


# -- what docker-registry does not do: tokens, redirects, lies ---------------------------------


class Played:
    """A registry of a few lines that can be told to lie."""

    def __init__(self, layout: Path) -> None:
        self.blobs = {f"sha256:{one.name}": one.read_bytes() for one in layout.rglob("sha256/*")}
        index = json.loads((layout / "index.json").read_text())
        self.manifest = index["manifests"][0]["digest"]
        self.token = ""
        self.redirect = ""
        self.seen: list[tuple[str, str]] = []
        played = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                played.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"

    def answer(self, asked: http.server.BaseHTTPRequestHandler) -> None:
        self.seen.append((asked.path, asked.headers.get("Authorization") or ""))
        if asked.path.startswith("/token?"):
            self.send(asked, 200, json.dumps({"token": "t"}).encode())
        elif self.token and asked.headers.get("Authorization") != "Bearer t":
            self.send(asked, 401, b"", WWW_Authenticate=self.token)
        elif "/manifests/" in asked.path:
            self.send(asked, 200, self.blobs[self.manifest],
                      Content_Type="application/vnd.oci.image.manifest.v1+json")  # fmt: skip
        elif self.redirect and asked.path.startswith("/v2/"):
            self.send(asked, 307, b"", Location=self.redirect + asked.path.rpartition("/")[2])
        else:
            self.send(asked, 200, self.blobs[asked.path.rpartition("/")[2]])

    @staticmethod
    def send(
        asked: http.server.BaseHTTPRequestHandler, status: int, data: bytes, **headers: str
    ) -> None:
        asked.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            asked.send_header(name.replace("_", "-"), value)
        asked.end_headers()
        asked.wfile.write(data)


@contextmanager
def played(layout: Path) -> Iterator[Played]:
    found = Played(layout)
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.server.shutdown()
        thread.join()
        found.server.server_close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Played]:
    with played(oci_layout(tmp_path / "layout", LAYERS, CONFIG)) as found:
        yield found


@pytest.mark.needs("userns")
def test_a_token_is_fetched_where_the_registry_says(place: Store, fake: Played) -> None:
    fake.token = f'Bearer realm="http://{fake.host}/token",service="s",scope="repository:x:pull"'
    assert pull(place, f"{fake.host}/x:1").new == 2
    assert ("/token?service=s&scope=repository%3Ax%3Apull", "") in fake.seen


@pytest.mark.needs("userns")
@pytest.mark.parametrize(
    "realm", ["http://registry.invalid/token", "file:///etc/passwd", "ftp://x"]
)
def test_no_token_is_fetched_elsewhere_without_tls(realm: str, place: Store, fake: Played) -> None:
    fake.token = f'Bearer realm="{realm}",service="s"'
    with pytest.raises(ImageError, match="wants a token of"):
        pull(place, f"{fake.host}/x:1")


@pytest.mark.needs("userns")
def test_who_blobs_are_redirected_to_gets_no_token(
    place: Store, fake: Played, tmp_path: Path
) -> None:
    with played(tmp_path / "layout") as elsewhere:
        fake.token = f'Bearer realm="http://{fake.host}/token"'
        fake.redirect = f"http://{elsewhere.host}/data/"
        assert pull(place, f"{fake.host}/x:1").new == 2
        assert len(elsewhere.seen) == 3
        assert {authorization for _, authorization in elsewhere.seen} == {""}


def lie(fake: Played, what: str) -> str:
    """Changes what the registry has; returns what the error must say."""
    parts = json.loads(fake.blobs[fake.manifest])
    layer, config = parts["layers"][0], parts["config"]["digest"]
    if what == "layer":
        fake.blobs[layer["digest"]] = gzip.compress(file(b"evil") + END)
        return "digest"
    if what == "endless layer":
        fake.blobs[layer["digest"]] += bytes(1 << 20)
        return ""
    if what == "config":
        fake.blobs[config] = fake.blobs[config].replace(b"linux", b"LINUX")
        return "the configuration: its digest is"
    if what == "short layer":
        fake.blobs[layer["digest"]] = fake.blobs[layer["digest"]][:-20]
        return "truncated|digest"
    new = {
        "huge manifest": b" " * (5 << 20),
        "no json": b"<html>",
        "no size": json.dumps({**parts, "layers": [{"digest": layer["digest"]}] * 2}).encode(),
        "bad digest": json.dumps(
            {**parts, "layers": [{**layer, "digest": "sha256:../../x"}] * 2}
        ).encode(),
    }[what]
    fake.manifest = f"sha256:{hashlib.sha256(new).hexdigest()}"
    fake.blobs[fake.manifest] = new
    return {
        "huge manifest": "a manifest of more than", "no json": "the registry's manifest",
        "no size": "how large", "bad digest": "is no digest",
    }[what]  # fmt: skip


@pytest.mark.needs("userns")
@pytest.mark.parametrize(
    "what",
    ["layer", "config", "short layer", "huge manifest", "no json", "no size", "bad digest"],
)
def test_a_registry_that_lies(what: str, place: Store, fake: Played) -> None:
    said = lie(fake, what)
    with pytest.raises(ImageError, match=said):
        pull(place, f"{fake.host}/x:1")
    assert place.images() == []


@pytest.mark.needs("userns")
def test_no_more_is_read_than_the_manifest_says(place: Store, fake: Played) -> None:
    lie(fake, "endless layer")
    assert pull(place, f"{fake.host}/x:1").new == 2


@pytest.mark.needs("userns")
def test_a_manifest_is_held_against_a_digest_in_the_reference(place: Store, fake: Played) -> None:
    with pytest.raises(ImageError, match="the manifest: its digest is"):
        pull(place, f"{fake.host}/x@sha256:{'0' * 64}")


@pytest.mark.needs("userns")
def test_nobody_is_there(place: Store) -> None:
    with pytest.raises(ImageError, match="refused"):
        pull(place, "127.0.0.1:1/x")


# -- references --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url", "path", "tag"),
    [
        ("localhost/a", "http://localhost/v2/", "a", "latest"),
        ("127.0.0.1:5000/a/b:c", "http://127.0.0.1:5000/v2/", "a/b", "c"),
        ("registry.example/a", "https://registry.example/v2/", "a", "latest"),
        ("registry.example:80/a:1", "https://registry.example:80/v2/", "a", "1"),
        ("a.b/c@sha256:" + "0" * 64, "https://a.b/v2/", "c", "sha256:" + "0" * 64),
    ],
)
def test_references(text: str, url: str, path: str, tag: str) -> None:
    found = parse(text)
    assert (found.url, found.path, found.tag) == (url, path, tag)


@pytest.mark.parametrize(
    "text",
    ["", "a", "debian:13", "library/debian", "a.b/", "a.b/A", "a.b/../c", "a.b/c:", "a.b/c@x",
     "a.b/c d", "a.b@c/d", "a.b/c:d/e", "u:p@a.b/c", "a.b?x/c"],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ImageError, match=r"names no registry|is not HOST"):
        parse(text)


def test_loopback() -> None:
    here = ["localhost", "localhost:5000", "127.0.0.1", "127.8.8.8:1", "[::1]:5000"]
    there = ["localhost.example", "10.0.0.1:5000", "127.0.0.1.example", "[2001:db8::1]:5000"]
    assert [is_loopback(one) for one in here + there] == [True] * 5 + [False] * 4


def test_credentials_that_cannot_be_read_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    for text in ("", "[]", '{"auths": {"h": {"auth": "%%%"}}}', '{"auths": {"other": {}}}'):
        (tmp_path / "auth.json").write_text(text)
        assert credentials("h") is None
