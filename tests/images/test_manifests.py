"""Whatever the JSON of an image says: it is an image or an ImageError, nothing outside is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.errors import ImageError
from sandboxd.images import manifests
from sandboxd.images.archive import Folder, Read
from tests.images.making import END, docker_archive, file, oci_layout, sha256

LAYER = file(b"a") + END
WORDS = ["", "a", "config", "layer.tar", "/etc/passwd", "../secret", "a\0b", "\ud800", "é",
         "blobs/sha256/x", "sha256:" + "0" * 64, "sha256:../../x", "linux", "amd64", "index.json",
         *manifests.INDEXES, *manifests.MANIFESTS]  # fmt: skip
KEYS = ["manifests", "digest", "size", "mediaType", "platform", "architecture", "os", "config",
        "layers", "annotations", "Config", "Layers", "RepoTags", "rootfs", "diff_ids", "Env", "Cmd",
        "Entrypoint", "User", "WorkingDir"]  # fmt: skip
documents = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(WORDS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
texts = st.one_of(documents.map(json.dumps).map(str.encode), st.binary(max_size=40))


class Known:
    """Files that are nowhere but here."""

    def __init__(self, known: dict[str, bytes], default: bytes) -> None:
        self.known = known
        self.default = default

    def has(self, name: str) -> bool:
        return name in self.known

    @contextmanager
    def reader(self, name: str) -> Iterator[Read]:
        left = self.known.get(name, self.default)

        def read(count: int) -> bytes:
            nonlocal left
            data, left = left[:count], left[count:]
            return data

        yield read


@given(texts, texts, st.sampled_from(["index.json", "manifest.json"]))
def test_any_json(first: bytes, other: bytes, name: str) -> None:
    try:
        found = manifests.find(Known({name: first}, other))
        for one in found:
            manifests.how_to_run(one.config)
    except ImageError:
        return
    assert all(0 < len(one.layers) <= manifests.MOST_LAYERS for one in found)


@given(texts)
def test_any_configuration(data: bytes) -> None:
    try:
        config, _ = manifests.read_config(data, 1)
        how = manifests.how_to_run(config)
    except ImageError:
        return
    assert how.cwd is None or how.cwd.startswith("/")


def changed(top: Path, **changes: Any) -> Folder:
    """An OCI layout whose index says something else; closed by the test."""
    index = json.loads((top / "index.json").read_text())
    index["manifests"][0] |= changes
    (top / "index.json").write_text(json.dumps(index))
    return Folder(os.open(top, os.O_RDONLY | os.O_DIRECTORY))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"digest": "sha256:" + "0" * 64}, "No such file"),
        ({"digest": "sha256:../../../etc/passwd"}, "is no digest"),
        ({"digest": "md5:0"}, "is no digest"),
        ({"platform": {"os": "windows", "architecture": "amd64"}}, "no image for linux"),
        ({"platform": {"os": "linux", "architecture": "s390x"}}, "no image for linux"),
        ({"mediaType": "application/vnd.oci.image.index.v1+json"}, "required field `manifests`"),
    ],
)
def test_indexes_that_lead_nowhere(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    files = changed(oci_layout(tmp_path / "layout", [LAYER]), **changes)
    try:
        with pytest.raises(ImageError, match=said):
            manifests.find(files)
    finally:
        os.close(files.opened)


def test_an_index_that_contains_itself(tmp_path: Path) -> None:
    kind = "application/vnd.oci.image.index.v1+json"
    inner = b'{"manifests": []}'
    blobs: dict[str, bytes] = {}
    for _ in range(6):
        blobs[manifests.blob(sha256(inner))] = inner
        inner = json.dumps({"manifests": [{"digest": sha256(inner), "mediaType": kind}]}).encode()
    with pytest.raises(ImageError, match="indexes within indexes"):
        manifests.find(Known(blobs | {"index.json": inner}, b""))


def test_a_blob_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    top = oci_layout(tmp_path / "layout", [LAYER])
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "secret").chmod(0o600)
    (top / "index.json").unlink()
    (top / "index.json").symlink_to(tmp_path / "secret")
    files = Folder(os.open(top, os.O_RDONLY | os.O_DIRECTORY))
    try:
        with pytest.raises(ImageError, match="neither an OCI layout"):
            manifests.find(files)
    finally:
        os.close(files.opened)


def test_too_many_layers() -> None:
    data = docker_archive([LAYER], "x:1", {})
    assert b"manifest.json" in data
    ids = [sha256(b"")] * 200
    config = json.dumps({"rootfs": {"diff_ids": ids}}).encode()
    with pytest.raises(ImageError, match="200 layers"):
        manifests.read_config(config, 200)
