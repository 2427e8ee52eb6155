"""The files of /etc that are sandboxd's, in an image that has its own in their places."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sandboxd.images.importing import import_image
from sandboxd.policy import Identity, Root
from tests.images import making
from tests.images.making import END, SMALL, file, folder, ids, link, oci_layout, tarball
from tests.images.test_running import DRIVERS, EITHER, policy, run

pytestmark = pytest.mark.needs("userns")
THEIRS = (
    folder(b"etc") + file(b"etc/hosts", b"1.2.3.4 somewhere else\n" * 100)
    + link(b"etc/resolv.conf", b"../run/nowhere/resolv.conf") + link(b"etc/hostname", b"/srv/name")
    + file(b"srv/name", b"theirs\n")
)  # fmt: skip


@DRIVERS
@EITHER
async def test_theirs_give_way(
    driver: str, writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long files leave no tail, and links are not written through, wherever they lead."""
    monkeypatch.setenv("SANDBOXD_IMAGES", str(tmp_path / "store"))
    with making.store(tmp_path / "store") as found:
        layers = [tarball(making.system(tmp_path / "system")), THEIRS + END]
        top = oci_layout(tmp_path / "layout", layers, {"Env": ["PATH=/usr/bin"]})
        import_image(found, str(top), "made", ids(), dataclasses.replace(SMALL, entries=9999))
        root = Root(image="made", driver=driver, writable=writable, proc="masked")  # type: ignore[arg-type]
        chosen = policy(root, Identity(hostname="mine"))
        script = "cat /etc/hosts /etc/resolv.conf /etc/hostname /srv/name"
        result = await run(chosen, "sh", "-c", script)
        assert result.stdout == b"127.0.0.1 localhost mine\n::1 localhost mine\nmine\ntheirs\n"
        assert result.ok, result
