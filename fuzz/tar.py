"""Whatever bytes a tar archive has, Reader yields entries that hold together or raises TarError.

They hold together: names and hard links are plain (no slash in front, no empty part, no dots),
sizes are within bounds, and the pieces of a file lie one after the other and are all there.

    ./do fuzz tar          # until stopped by an error, or after a million examples
    ./do fuzz tar 5000     # that many examples
"""

from __future__ import annotations

import io
import sys

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.images import tar

BLOCK = tar.BLOCK
KINDS = [b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"x", b"g", b"L", b"K", b"V"]
NAMES = [b"a", b"a/b", b"./a", b"/a", b"../a", b"a/..", b"", b"/", b".wh.a", b"\xff", b"x" * 100]
KEYS = [b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"GNU.sparse.major",
        b"GNU.sparse.minor", b"GNU.sparse.realsize", b"GNU.sparse.map", b"GNU.sparse.size",
        b"GNU.sparse.name", b"SCHILY.xattr.user.a", b"comment"]  # fmt: skip
VALUES = [b"0", b"1", b"5", b"-1", b"512", b"1.5", b"1" * 20, b"0,5", b"0,5,6,1", b"a/b", b"../x"]

numbers = st.one_of(
    st.integers(0, 2000).map(lambda number: b"%o" % number),
    st.integers(-(1 << 80), 1 << 80).map(
        lambda number: ((1 << 95) | (number & ((1 << 95) - 1))).to_bytes(12, "big")
    ),
    st.binary(max_size=12),
)
records = st.lists(
    st.tuples(st.sampled_from(KEYS), st.one_of(st.sampled_from(VALUES), st.binary(max_size=8))),
    max_size=4,
)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length += 1
    return b"%d" % length + body


def header(name: bytes, kind: bytes, size: bytes, extra: bytes) -> bytes:
    block = name[:100].ljust(100, b"\0") + b"0000644\0" * 3 + size[:12].ljust(12, b"\0")
    block += b"%011o\0" % 0 + b" " * 8 + kind + b"a".ljust(100, b"\0") + b"ustar\x0000"
    block = (block + bytes(121) + extra[:104].ljust(104, b"\0")).ljust(BLOCK, b"\0")[:BLOCK]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


@st.composite
def members(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(KINDS))
    data = draw(st.binary(max_size=40))
    if kind in (b"x", b"g") and draw(st.booleans()):
        data = b"".join(record(*one) for one in draw(records))
    size = b"%o" % len(data) if draw(st.integers(0, 4)) else draw(numbers)
    name = draw(st.one_of(st.sampled_from(NAMES), st.binary(max_size=100)))
    extra = draw(st.binary(max_size=104))
    return header(name, kind, size, extra) + data + bytes(-len(data) % BLOCK)


archives = st.one_of(
    st.lists(members(), max_size=5).map(lambda parts: b"".join(parts) + bytes(1024)),
    st.tuples(st.lists(members(), max_size=3), st.binary(max_size=600)).map(
        lambda pair: b"".join(pair[0]) + pair[1]
    ),
    st.binary(max_size=2000),
)


def check(data: bytes) -> None:
    reader = tar.Reader(io.BytesIO(data).read)
    try:
        for entry in reader:
            holds(entry)
            end = 0
            for at, piece in reader.content(entry):
                assert end <= at
                end = at + len(piece)
                assert end <= entry.size
    except tar.TarError:
        return


def holds(entry: tar.Entry) -> None:
    names = [entry.name, entry.target] if entry.kind == tar.HARDLINK else [entry.name]
    for name in names:
        assert name == tar.plain(name or b".")
        assert len(name) < tar.LONGEST_PATH
        assert not {b"", b".", b".."} & set(name.split(b"/")) or not name
    assert entry.name or entry.kind == tar.DIRECTORY
    assert 0 <= entry.stored <= tar.LARGEST
    assert 0 <= entry.size <= tar.LARGEST
    assert entry.kind == tar.FILE or entry.stored == 0
    assert entry.uid >= 0 <= entry.gid
    assert 0 <= entry.mode <= 0o7777


def fuzz(examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip
    @given(archives)
    def whatever(data: bytes) -> None:
        check(data)

    whatever()


if __name__ == "__main__":
    fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
