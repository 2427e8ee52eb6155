"""Layers in the store: from every kind of source, once, whole, as their makers meant them."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.errors import HostError, ImageError
from sandboxd.images import store as stores
from sandboxd.images.importing import import_image
from sandboxd.images.store import Store
from sandboxd.images.streams import plain
from sandboxd.images.unpacking import open_unpacker
from sandboxd.stores.folders import NEW
from tests import needs
from tests.images import making
from tests.images.making import (
    END,
    SMALL,
    docker_archive,
    file,
    folder,
    hard,
    ids,
    link,
    oci_layout,
    octal,
    pax,
    sha256,
    take,
)

pytestmark = pytest.mark.needs("userns")

SUBUID = pytest.mark.needs("subuid")
LOWER = folder(b"etc") + file(b"etc/gone") + file(b"etc/kept") + folder(b"dir") + file(b"dir/a")
UPPER = (
    folder(b"etc") + file(b"etc/.wh.gone", b"") + folder(b"dir") + file(b"dir/.wh..wh..opq", b"")
    + file(b"dir/b")
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Store]:
    with making.store(tmp_path / "store") as found:
        yield found


def one_root(place: Store) -> Path:
    (layer,) = place.layers()
    return layer / "root"


def layer_names(place: Store) -> list[str]:
    return os.listdir(place.place / "layers")


# -- sources -----------------------------------------------------------------------------------


def test_an_oci_layout_as_a_directory_and_as_an_archive(tmp_path: Path, place: Store) -> None:
    layers = [LOWER + END, UPPER + END]
    config: dict[str, object] = {
        "Env": ["PATH=/bin", "EMPTY=", "nonsense"], "WorkingDir": "/srv", "Entrypoint": ["/run"],
        "Cmd": ["--help"], "User": "7:8",
    }  # fmt: skip
    top = oci_layout(tmp_path / "layout", layers, config, "fruit:1")
    (first,) = import_image(place, str(top), None, ids(), SMALL)
    assert (first.record.name, first.new) == ("fruit:1", 2)
    how = first.record.config
    assert how.env == (("PATH", "/bin"), ("EMPTY", ""))
    assert (how.cwd, how.argv, how.uid, how.gid) == ("/srv", ("/run", "--help"), 7, 8)
    archive = tmp_path / "layout.tar"
    with tarfile.open(archive, "w") as writing:
        for part in ("index.json", "oci-layout", "blobs"):
            writing.add(top / part, part)
    (second,) = import_image(place, str(archive), "again", ids(), SMALL)
    assert (second.record.id, second.new) == (first.record.id, 0)
    assert len(layer_names(place)) == 2
    archive.unlink()
    assert [one.name for one in place.images()] == ["again", "fruit:1"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_docker_save_writes(pack: object, place: Store) -> None:
    data = docker_archive([LOWER + END, UPPER + END], "fruit:2", {"Cmd": ["sh"]})
    (found,) = import_image(place, io.BytesIO(pack(data)), None, ids(), SMALL)  # type: ignore[operator]
    assert (found.record.name, found.new, found.record.config.argv) == ("fruit:2", 2, ("sh",))


def test_a_plain_archive_is_one_layer_named_after_its_file(tmp_path: Path, place: Store) -> None:
    source = tmp_path / "roots.tar.gz"
    source.write_bytes(gzip.compress(LOWER + END))
    (found,) = import_image(place, str(source), None, ids(), SMALL)
    assert (found.record.name, found.record.id) == ("roots", sha256(LOWER + END))
    assert (one_root(place) / "etc/kept").read_text() == "data\n"


def test_several_members_of_gzip_are_one_archive(place: Store) -> None:
    data = LOWER + END
    packed = gzip.compress(data[:700]) + gzip.compress(data[700:]) + bytes(300)
    assert take(place, packed).record.id == sha256(data)


def test_zstd_is_read_or_asked_for(place: Store) -> None:
    zstd = pytest.importorskip("backports.zstd", reason="needs zstd: backports.zstd")
    data = LOWER + END
    packed = zstd.compress(data[:700]) + zstd.compress(data[700:])
    assert take(place, packed).record.id == sha256(data)
    with pytest.raises(ImageError, match="truncated"):
        take(place, packed[:-3])
    broken = packed[:4] + bytes([0xFF] * 12) + packed[16:]
    with pytest.raises(ImageError, match="damaged zstd data"):
        b"".join(plain(io.BytesIO(broken).read))


@pytest.mark.parametrize("form", ["ustar", "pax", "gnu"])
def test_what_gnu_tar_writes(form: str, tmp_path: Path, place: Store) -> None:
    if reason := needs.works("tar", "--version"):
        pytest.skip(f"needs tar: {reason}")
    top = tmp_path / "top"
    (top / "some/where").mkdir(parents=True)
    (top / "some/file").write_bytes(b"x" * 70000)
    (top / "some/empty").touch()
    os.link(top / "some/file", top / "some/where/hard")
    (top / "some/link").symlink_to("where/hard")
    (top / "é\n").write_text("name")
    if form != "ustar":
        (top / ("long" * 50)).write_text("long")
        (top / "to-long").symlink_to("long" * 50)
        with (top / "holes").open("wb") as holes:
            for at in (1 << 20, 5 << 20, 9 << 20):
                holes.seek(at)
                holes.write(b"data")
            holes.truncate(12 << 20)
    sparse = [] if form == "ustar" else ["-S"]
    words = ["tar", "-C", str(top), f"--format={form}", *sparse, "-c", "."]
    take(place, subprocess.run(words, capture_output=True, check=True).stdout)
    assert described(one_root(place)) == described(top)


def described(top: Path) -> dict[str, object]:
    """All of a tree that an archive keeps."""
    found: dict[str, object] = {}
    for path in top.rglob("*"):
        there = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = (path.read_bytes(), there.st_nlink, there.st_blocks * 512 < 1 << 20)
        found[str(path.relative_to(top))] = (there.st_mode, int(there.st_mtime), content)
    return found


# -- whiteouts and owners ----------------------------------------------------------------------


def test_whiteouts_become_what_overlayfs_reads(place: Store) -> None:
    take(place, UPPER + END)
    root = one_root(place)
    gone = (root / "etc/gone").lstat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert os.getxattr(root / "dir", "user.overlay.opaque") == b"y"
    assert os.listdir(root / "dir") == ["b"]


def test_a_whiteout_beside_what_it_hides_is_about_lower_layers(place: Store) -> None:
    data = folder(b"d") + file(b"d/x") + file(b".wh.d", b"") + file(b"f") + file(b".wh.f", b"")
    take(place, data + file(b"d/.wh..wh.plnk", b"") + END)
    root = one_root(place)
    assert os.getxattr(root / "d", "user.overlay.opaque") == b"y"
    assert sorted(os.listdir(root)) == ["d", "f"]
    assert os.listdir(root / "d") == ["x"]


@SUBUID
def test_owners_are_those_of_the_tenants_map(place: Store) -> None:
    made = take(place, file(b"a", uid=octal(33, 8), gid=octal(44, 8)) + file(b"b") + END)
    rows = [*ids().uids, *ids().gids]
    outside = {inside: start for inside, start, _ in rows[: len(ids().uids)]}
    there = (one_root(place) / "a").stat()
    first = outside[0] + 33 if len(outside) == 1 else outside[1] + 32
    assert there.st_uid == first
    assert made.layers[0].highest_id == 44
    assert made.layers[0].owners == 0


def test_with_one_id_everything_is_the_callers_and_that_is_said(place: Store) -> None:
    data = file(b"a", uid=octal(33, 8)) + file(b"b") + END
    (found,) = import_image(place, io.BytesIO(data), "made", ids(single=True), SMALL)
    assert found.layers[0].owners == 1
    assert (one_root(place) / "a").stat().st_uid == os.getuid()
    image = place.image(found.record, stores.ids_tag(ids(single=True)))
    assert "1 of its files have owners without an id here" in image.notes[0]


def test_users_are_looked_up_in_the_image(tmp_path: Path, place: Store) -> None:
    passwd = file(b"etc/passwd", b"root:x:0:0::/:/bin/sh\nweb:x:101:102::/:/bin/sh\n")
    layers = [passwd + file(b"etc/group", b"root:x:0:\nstaff:x:50:\n") + END]
    wanted = {"web": (101, 102), "web:staff": (101, 50), "101": (101, 102), "9": (9, 0),
              "nobody-there": (None, None), "70000": (None, None), "5:staff": (5, 50)}  # fmt: skip
    for number, (user, found) in enumerate(wanted.items()):
        top = oci_layout(tmp_path / str(number), layers, {"User": user})
        (taken,) = import_image(place, str(top), "users", ids(), SMALL)
        assert (taken.record.config.uid, taken.record.config.gid) == found, user


def test_permissions_and_times_of_directories_are_kept(place: Store) -> None:
    data = pax([(b"mtime", b"1000000000.5")]) + folder(b"a", 0o500) + file(b"a/b") + folder(b"a/c")
    take(place, data + hard(b"a/d", b"a/b") + link(b"e", b"a") + END)
    there = (one_root(place) / "a").stat()
    assert (stat.S_IMODE(there.st_mode), there.st_mtime) == (0o500, 1000000000)


# -- digests, interruptions, two at once -------------------------------------------------------


@pytest.mark.parametrize("what", ["layer", "config", "manifest"])
def test_a_wrong_digest_makes_nothing_visible(what: str, tmp_path: Path, place: Store) -> None:
    top = oci_layout(tmp_path / "layout", [LOWER + END])
    index = json.loads((top / "index.json").read_text())
    manifest = top / "blobs/sha256" / index["manifests"][0]["digest"][7:]
    parts = json.loads(manifest.read_text())
    wrong = {
        "layer": top / "blobs/sha256" / parts["layers"][0]["digest"][7:],
        "config": top / "blobs/sha256" / parts["config"]["digest"][7:],
        "manifest": manifest,
    }[what]
    good = wrong.read_bytes()
    # Still a whole archive and right JSON, but not the bytes that were named.
    wrong.write_bytes(gzip.compress(UPPER + END) if what == "layer" else good + b" ")
    with pytest.raises(ImageError, match="digest"):
        import_image(place, str(top), None, ids(), SMALL)
    assert layer_names(place) == []
    assert place.images() == []


def test_a_diff_id_that_lies_is_found(place: Store) -> None:
    data = docker_archive([LOWER + END], "lie:1", {})
    forged = data.replace(sha256(LOWER + END).encode(), sha256(b"").encode())
    assert forged != data
    with pytest.raises(ImageError, match="digest"):
        take(place, forged)
    assert layer_names(place) == []


def test_what_a_dead_import_left_is_swept(place: Store) -> None:
    take(place, LOWER + END)
    left = place.place / "layers" / f"{NEW}1-dead"
    (left / "root/deep/er").mkdir(parents=True)
    (left / "root/deep/er/file").touch()
    (left / "root/deep").chmod(0o500)
    take(place, LOWER + END)
    assert len(layer_names(place)) == 1


def test_an_import_that_is_killed_leaves_nothing_visible(place: Store) -> None:
    """SIGKILL in the middle of a layer: the unpacker ends, and the next import sweeps."""
    words = [sys.executable, "-P", "-m", "sandboxd", "image", "import", "-", "--name", "killed"]
    environment = os.environ | {"SANDBOXD_IMAGES": str(place.place)}
    whole = file(b"a", b"x" * 100_000) + file(b"b") + END
    with subprocess.Popen(words, stdin=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        # More than a pipe holds: once it is written, the import is reading.
        process.stdin.write(gzip.compress(os.urandom(1 << 20))[: 1 << 19])
        process.stdin.flush()
        process.kill()
    assert place.images() == []
    take(place, whole)
    assert [one.name for one in place.images()] == ["made"]
    assert len(layer_names(place)) == 1


def test_a_layer_that_is_half_unpacked_when_its_import_is_killed(
    tmp_path: Path, place: Store
) -> None:
    """A FIFO inside of an OCI layout cannot be, so a process is stopped while its layer grows."""
    big = b"".join(file(b"%d" % one, os.urandom(2000)) for one in range(1500)) + END
    source = tmp_path / "big.tar"
    source.write_bytes(big)
    words = [sys.executable, "-P", "-m", "sandboxd", "image", "import", str(source)]
    environment = os.environ | {"SANDBOXD_IMAGES": str(place.place)}
    layers = place.place / "layers"
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(layers.glob(f"{NEW}*/root/*")):
            pass
        process.kill()
    if process.returncode:
        assert place.images() == []
    take(place, LOWER + END)
    assert not [one for one in layer_names(place) if one.startswith(NEW)]


def test_two_imports_at_once_are_both_right(place: Store) -> None:
    data = b"".join(file(b"%d" % one, os.urandom(100)) for one in range(300)) + END
    errors: list[BaseException] = []

    def one(number: int) -> None:
        try:
            take(place, data, name=f"image-{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(place.images()) == 4
    assert len(layer_names(place)) == 1


def test_nothing_is_removed_while_something_is_imported(place: Store) -> None:
    with open_unpacker(ids()) as unpacker, place.importing(unpacker):
        with pytest.raises(ImageError, match="something is being imported"):
            with place.removing(unpacker):
                pass


def test_nothing_is_removed_while_a_record_cannot_be_read(place: Store) -> None:
    take(place, LOWER + END)
    (place.place / "images/newer.json").write_text('{"schema": "sandboxd.image/9"}')
    assert [one.name for one in place.images()] == ["made"]
    with open_unpacker(ids()) as unpacker, place.removing(unpacker):
        with pytest.raises(ImageError, match=r"newer\.json"):
            place.collect(unpacker)
    (place.place / "images/newer.json").unlink()
    assert len(layer_names(place)) == 1


# -- names -------------------------------------------------------------------------------------


def test_a_full_disk_is_the_machines_fault(tmp_path: Path) -> None:
    place = Store(tmp_path / "store")
    with (
        open_unpacker(ids()) as unpacker,
        pytest.raises(HostError, match="No space left on device"),
        place.importing(unpacker),
        open("/dev/full", "wb", buffering=0) as full,  # full(4)
    ):
        full.write(b"1")


@pytest.mark.parametrize(
    "name", ["", "/etc", "../x", "a//b", "a b", "-a", "a:b:c:d", "x" * 200, "abcdef0", "é", "a\n"]
)
def test_names_that_are_none(name: str, place: Store) -> None:
    with pytest.raises(ImageError, match="cannot be the name"):
        take(place, LOWER + END, name=name)


def test_an_image_is_found_by_name_latest_and_id(place: Store) -> None:
    record = take(place, LOWER + END, name="local:5000/some/name:latest").record
    for name in ("local:5000/some/name:latest", "local:5000/some/name", record.id, record.id[7:16]):
        assert place.find(name) == record
    assert place.find("some/name") is None
    assert place.find("0000000") is None
