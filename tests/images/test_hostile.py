"""Archives that mean harm: each is refused with a reason or made harmless; nothing gets outside.

Every import runs beside a directory with a file that such archives are after. CVE numbers name the
advisory of the program that fell for it.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.errors import ImageError
from sandboxd.images.store import Store
from sandboxd.images.unpacking import Limits
from tests.images import making
from tests.images.making import (
    END,
    binary,
    docker_archive,
    file,
    folder,
    hard,
    header,
    link,
    octal,
    padded,
    pax,
    take,
)

pytestmark = pytest.mark.needs("userns")

SECRET = "not for images"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """What must stay as it is: a file beside the store, and all that is around it."""
    target = tmp_path / "victim"
    target.write_text(SECRET)
    target.chmod(0o640)
    before = sorted(os.listdir(tmp_path))
    yield target
    assert target.read_text() == SECRET
    there = target.stat()
    assert (stat.S_IMODE(there.st_mode), there.st_nlink) == (0o640, 1)
    assert sorted(set(os.listdir(tmp_path)) - {"store"}) == before


@pytest.fixture
def place(tmp_path: Path, victim: Path) -> Iterator[Store]:
    with making.store(tmp_path / "store") as found:
        yield found


def root(place: Store) -> Path:
    (layer,) = place.layers()
    return layer / "root"


def names(top: Path) -> list[str]:
    return sorted(str(path.relative_to(top)) for path in top.rglob("*"))


def sparse(name: bytes, size: int) -> bytes:
    """Old GNU: one byte of data, the rest a hole."""
    block = bytearray(header(name, b"S", size=octal(1, 12), magic=b"ustar  \0"))
    block[386:410] = octal(0, 12) + octal(1, 12)
    block[483:495] = binary(size, 12)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + padded(b"x")


DEEP = b"/".join([b"d"] * 300)

REFUSED: dict[str, tuple[bytes, str]] = {
    "dot dot": (file(b"../victim"), r"a name with \.\. in it"),
    "dot dot within": (file(b"a/../../../victim"), r"a name with \.\. in it"),
    "dot dot as a directory": (folder(b"a/.."), r"a name with \.\. in it"),
    "dot dot in the prefix": (file(b"victim", prefix=b".."), r"a name with \.\. in it"),
    "dot dot in a pax path": (
        pax([(b"path", b"../victim")]) + file(b"harmless"), r"a name with \.\. in it"),
    "dot dot in a GNU long name": (
        header(b"././@LongLink", b"L", size=octal(10, 12)) + padded(b"../victim\0") + file(b"x"),
        r"a name with \.\. in it"),
    "a file through a link": (link(b"a", b"/") + file(b"a/victim"), "through a symbolic link"),
    "a directory through a link": (link(b"a", b"..") + folder(b"a/b"), "through a symbolic link"),
    "a link through a link": (link(b"a", b"..") + link(b"a/b", b"c"), "through a symbolic link"),
    # CVE-2021-32803 of node-tar: a directory first, then a link in its place
    "a file through a link made of a directory": (
        folder(b"a") + link(b"a", b"..") + file(b"a/victim"), "take the place of a directory"),
    "a file through a file": (file(b"a") + file(b"a/b"), "no directory"),
    # CVE-2019-14271, CVE-2025-45582 of GNU tar: links between entries that lead out
    "a hard link out": (hard(b"a", b"../victim"), r"a name with \.\. in it"),
    "a hard link to the host": (hard(b"a", b"/etc/passwd"), "not in this layer"),
    "a hard link through a link": (
        link(b"a", b"/etc") + hard(b"b", b"a/passwd"), "not in this layer"),
    "a hard link to a directory": (folder(b"a") + hard(b"b", b"a"), "a directory"),
    "a hard link to itself": (file(b"a") + hard(b"a", b"a"), "a link to itself"),
    "a hard link before its target": (hard(b"a", b"b") + file(b"b"), "not in this layer"),
    "a whiteout of the parent": (file(b".wh..."), "a whiteout of nothing"),
    "a whiteout through a link": (link(b"a", b"/") + file(b"a/.wh.etc"), "symbolic link"),
    "an opaque mark through a link": (
        link(b"a", b"/") + file(b"a/.wh..wh..opq"), "symbolic link"),
    "a link without a target": (link(b"a", b""), "a link to nowhere"),
    "a link with too long a target": (
        pax([(b"linkpath", b"x" * 5000)]) + link(b"a", b"b"), "too long a target"),
    "too long a name": (pax([(b"path", b"x" * 256)]) + file(b"a"), "too long or too deep"),
    "too long a path": (pax([(b"path", b"abc/" * 1100)]) + file(b"a"), "too long or too deep"),
    "too deep a path": (pax([(b"path", DEEP)]) + file(b"a"), "too long or too deep"),
    "a name with a NUL": (pax([(b"path", b"a\0b")]) + file(b"a"), "contains a NUL"),
    "an empty name": (file(b""), "empty or contains a NUL"),
    "a file that is the root": (file(b"./"), "an entry without a name|no file"),
    "a negative size": (header(b"a", size=binary(-512, 12)), "size is -512"),  # CVE-2025-8194
    "a huge size": (header(b"a", size=binary(1 << 70, 12)), "size is"),
    "a file larger than the limit": (header(b"a", size=octal(1 << 30, 12)), "more than .* bytes"),
    "a size that is no number": (header(b"a", size=b"12345x789abc"), "size is no number"),
    "a pax size that is no number": (pax([(b"size", b"-1")]) + file(b"a"), "to be a number"),
    "a huge pax header": (header(b"x", b"x", size=octal(1 << 30, 12)), "an extension header of"),
    "many pax headers": (pax([(b"comment", b"x" * 300000)]) * 5, "an extension header of|twice"),
    "a pax record that lies about its length": (
        header(b"x", b"x", size=octal(12, 12)) + padded(b"99999 a=b\n\n"), "no list of records"),
    "a pax record without end": (
        header(b"x", b"x", size=octal(4, 12)) + padded(b"4 a="), "no list of records"),
    "a pax path twice": (
        pax([(b"path", b"a"), (b"path", b"b")]) + file(b"c"), "one thing twice"),
    "a global path": (pax([(b"path", b"a")], b"g") + file(b"b"), "a global header that sets path"),
    "an extension of nothing": (pax([(b"path", b"a")]), "nothing after it"),
    "a huge sparse file": (sparse(b"a", 1 << 61), "more than .* bytes"),
    "a sparse map that sticks out": (
        pax([(b"GNU.sparse.map", b"0,5,900,5"), (b"GNU.sparse.size", b"100")])
        + file(b"a", b"0123456789"), "overlap or stick out"),
    "a sparse map that overlaps": (
        pax([(b"GNU.sparse.map", b"0,5,2,5"), (b"GNU.sparse.size", b"100")])
        + file(b"a", b"0123456789"), "overlap or stick out"),
    "a sparse map of too much": (
        pax([(b"GNU.sparse.map", b"0,50"), (b"GNU.sparse.size", b"100")])
        + file(b"a", b"0123456789"), "not what follows"),
    "an unknown kind": (header(b"a", b"V"), "unknown kind"),
    "a wrong checksum": (header(b"a").replace(b"ustar", b"usual"), "wrong checksum"),
    "a wrong checksum later": (
        file(b"a") + header(b"b").replace(b"ustar", b"usual"), "wrong checksum"),
    "a directory turned into a file": (folder(b"a") + file(b"a"), "take the place of a directory"),
    "too many entries": (b"".join(header(b"%d" % one) for one in range(2001)), "more than 2000"),
    "too many directories between": (
        b"".join(file(b"/".join([b"%d" % one] * 30)) for one in range(70)), "more than 2000"),
    "too many directories around whiteouts": (
        b"".join(file(b"/".join([b"%d" % one] * 30) + b"/.wh.x", b"") for one in range(70)),
        "more than 2000"),
    "an entry behind the end": (bytes(512) + file(b"a"), "after the end"),
    "an archive behind the archive": (END + file(b"a"), "after the end"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused(what: str, place: Store) -> None:
    data, reason = REFUSED[what]
    with pytest.raises(ImageError, match=reason):
        take(place, file(b"first") + data + END)
    assert place.layers() == []
    assert place.images() == []
    assert os.listdir(place.place / "layers") == []


@pytest.mark.parametrize("end", [0, 100, 512, 700, 1024])
def test_a_truncated_archive_is_refused(end: int, place: Store) -> None:
    data = file(b"first") + file(b"second", b"x" * 2000)
    with pytest.raises(ImageError, match=r"truncated|no tar"):
        take(place, data[: 1024 + end])
    assert os.listdir(place.place / "layers") == []


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("how", ["cut", "flipped", "followed"])
def test_damaged_compression_is_refused(pack: object, how: str, place: Store) -> None:
    data = bytearray(pack(file(b"a", os.urandom(4096)) + END))  # type: ignore[operator]
    if how == "flipped":
        data[len(data) // 2] ^= 0xFF
    data = data[:-9] if how == "cut" else data + b"junk!" if how == "followed" else data
    with pytest.raises(ImageError):
        take(place, bytes(data))
    assert place.layers() == []


def test_a_gzip_bomb_ends_at_the_limit_and_fills_no_disk(place: Store) -> None:
    bomb = gzip.compress(header(b"a", size=octal(256 << 20, 12)) + bytes(256 << 20) + END)
    assert len(bomb) < 1 << 20
    with pytest.raises(ImageError, match="more than"):
        take(place, bomb, Limits(bytes=128 << 20))
    take(place, bomb, Limits(bytes=512 << 20))
    there = (root(place) / "a").stat()
    assert there.st_size == 256 << 20
    assert there.st_blocks * 512 < 1 << 20


def test_layers_after_the_first_are_held_to_the_same_limits(tmp_path: Path, place: Store) -> None:
    layers = [file(b"a") + END, b"".join(header(b"%d" % one) for one in range(2001)) + END]
    archive = docker_archive(layers, "bomb:1", {})
    with pytest.raises(ImageError, match="more than 2000 entries"):
        take(place, archive)
    assert place.images() == []  # the first layer may stay: it is whole, and gc takes it


# -- made harmless -----------------------------------------------------------------------------


def test_absolute_names_are_below_the_root(place: Store) -> None:
    take(place, file(b"/etc/passwd") + file(b"//x///y") + file(b"./z") + END)
    assert names(root(place)) == ["etc", "etc/passwd", "x", "x/y", "z"]


def test_links_out_are_kept_and_lead_nowhere(place: Store, victim: Path) -> None:
    data = link(b"a", b"../../../victim") + link(b"b", str(victim).encode()) + link(b"c", b"/")
    take(place, data + END)
    assert os.readlink(root(place) / "b") == str(victim)


def test_a_file_that_replaces_a_link_does_not_follow_it(place: Store, victim: Path) -> None:
    take(place, link(b"a", str(victim).encode()) + file(b"a", b"new\n") + END)
    assert (root(place) / "a").read_text() == "new\n"
    assert not (root(place) / "a").is_symlink()


def test_a_hard_link_to_a_link_links_the_link(place: Store, victim: Path) -> None:
    take(place, link(b"a", str(victim).encode()) + hard(b"b", b"a") + END)
    assert (root(place) / "b").is_symlink()


def test_a_directory_that_replaces_a_link_does_not_follow_it(place: Store, victim: Path) -> None:
    data = link(b"a", str(victim.parent).encode()) + folder(b"a", 0o700) + file(b"a/new")
    take(place, data + END)
    assert names(root(place)) == ["a", "a/new"]


def test_duplicates_count_as_the_last_and_change_no_hard_link(place: Store) -> None:
    data = file(b"a", b"one") + hard(b"b", b"a") + file(b"a", b"two") + file(b"a", b"three")
    take(place, data + END)
    assert (root(place) / "a").read_text() == "three"
    assert (root(place) / "b").read_text() == "one"


def test_device_nodes_are_left_out_and_counted(place: Store) -> None:
    disk = octal(8, 8) + octal(0, 8)
    data = header(b"dev/sda", b"4", device=disk) + header(b"dev/mem", b"3", device=disk)
    imported = take(place, data + header(b"null", b"3") + header(b"pipe", b"6") + END)
    assert imported.layers[0].devices == 3
    assert names(root(place)) == ["pipe"]
    assert stat.S_ISFIFO((root(place) / "pipe").stat().st_mode)


def test_set_user_id_bits_are_dropped_and_counted(place: Store) -> None:
    data = b"".join(
        file(b"%o" % mode, mode=octal(mode, 8)) for mode in (0o4755, 0o2755, 0o6711, 0o1644)
    )
    imported = take(place, data + folder(b"shared", 0o2775) + END)
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in root(place).iterdir()}
    assert modes == {"4755": 0o755, "2755": 0o755, "6711": 0o711, "1644": 0o1644, "shared": 0o775}
    assert imported.layers[0].setid == 3


def test_attributes_that_steer_an_overlay_or_give_rights_are_dropped(place: Store) -> None:
    hidden = (b"user.overlay.opaque", b"user.overlay.redirect", b"user.overlay.metacopy",
              b"trusted.overlay.opaque", b"security.capability", b"system.posix_acl_access",
              b"user.containers.override_stat", b"user.fuseoverlayfs.opaque")  # fmt: skip
    records = [(b"SCHILY.xattr." + one, b"y") for one in (*hidden, b"user.mine")]
    imported = take(place, pax(records) + file(b"a") + END)
    assert imported.layers[0].xattrs == len(hidden)
    assert os.listxattr(root(place) / "a") == ["user.mine"]


def test_owners_out_of_range_are_squashed_and_counted(place: Store) -> None:
    data = file(b"a", uid=binary(1 << 31, 8)) + file(b"b", gid=octal(0o7777777, 8)) + file(b"c")
    assert take(place, data + END).layers[0].owners == 2


def test_times_that_are_none_do_no_harm(place: Store) -> None:
    data = file(b"a", mtime=binary(-5, 12)) + file(b"b", mtime=binary(1 << 60, 12))
    take(place, data + pax([(b"mtime", b"-1.5")]) + file(b"c") + END)
    times = [(root(place) / name).stat().st_mtime for name in "abc"]
    assert times[0] == times[2] == 0
    assert times[1] <= 1 << 34


def test_a_size_on_what_has_no_content_is_ignored(place: Store) -> None:
    data = header(b"a", b"5", size=octal(512, 12)) + header(b"b", b"2", link=b"c",
                                                            size=octal(99, 12))  # fmt: skip
    take(place, data + file(b"d") + END)
    assert names(root(place)) == ["a", "b", "d"]


def test_names_that_steer_a_terminal_are_spelled_out(place: Store) -> None:
    with pytest.raises(ImageError) as caught:
        take(place, file(b"\x1b[2J\xff/../x") + END)
    assert str(caught.value).isascii()
    assert "\\x1b[2J\\xff" in str(caught.value)
