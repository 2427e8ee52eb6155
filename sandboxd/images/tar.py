"""Whatever bytes come in, Reader yields entries that hold together, or raises TarError.

Why not the standard library's tarfile: it takes a damaged header in the middle for the end of the
archive, reads an extension header of any length into memory, and follows sizes below zero (older
ones, Debian 12's among them, for ever: CVE-2025-8194). Here every length is checked before it is
believed, and what two readers could take differently is refused.

Formats: ustar (POSIX.1-1988), pax (POSIX.1-2001; keys in _PAX), GNU long names, base-256 numbers
and sparse files of the kinds old GNU, 0.1 and 1.0 (GNU tar's manual, appendix D). Names are bytes.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing's, which is not imported for it
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 512
CHUNK = 1 << 18
LONGEST_PATH = 4096  # PATH_MAX (limits.h)
LONGEST_NAME = 255  # NAME_MAX
DEEPEST = 256
"""Parts of a name."""
MOST_EXTENSION = 1 << 20
"""Bytes of all extension headers of one entry."""
MOST_PIECES = 1 << 16
"""Pieces of data of one sparse file."""
LARGEST = 1 << 62

FILE, DIRECTORY, SYMLINK, HARDLINK, FIFO, DEVICE = b"f", b"d", b"l", b"h", b"p", b"c"
_KINDS = {
    b"0": FILE, b"\0": FILE, b"7": FILE, b"S": FILE, b"1": HARDLINK, b"2": SYMLINK,
    b"3": DEVICE, b"4": DEVICE, b"5": DIRECTORY, b"6": FIFO,
}  # fmt: skip
_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
# A global header that says one of these would mean another thing to who ignores such headers.
_NOT_GLOBAL = (b"path", b"linkpath", b"size", b"uid", b"gid", _SPARSE, _XATTR)

Records = list[tuple[bytes, bytes]]
Piece = tuple[int, int]
"""Offset in the file and length of a run of data."""


class TarError(Exception):
    """The archive is damaged, or means harm."""


class Entry:
    """One thing of an archive. `size` is how long the file says it is, holes included."""

    __slots__ = (
        *("gid", "kind", "mode", "mtime", "name", "offset", "pieces", "size", "stored", "target"),
        *("uid", "xattrs"),
    )

    def __init__(self, kind: bytes, name: bytes) -> None:
        self.kind = kind
        self.name = name
        self.target = b""
        self.mode = self.uid = self.gid = self.mtime = 0
        self.size = 0
        self.stored = 0
        """Bytes that stand in the archive, from `offset` on."""
        self.offset = 0
        self.pieces: list[Piece] = []
        self.xattrs: dict[bytes, bytes] = {}


class Reader:
    """Entries in the order of the archive; each one's content before the next is asked for."""

    def __init__(self, read: Callable[[int], bytes], skip: Callable[[int], int] | None = None):
        """`read` gives as many bytes as asked for, fewer only at the end; `skip` is like it."""
        self._read = read
        self._skip = skip or self._read_away
        self._left = 0
        self._padding = 0
        self._at = 0
        self.ended = False
        """Whether the mark of the end (two blocks of zeros) was there."""

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self._next()) is not None:
            yield entry

    # -- what an entry contains

    def content(self, entry: Entry) -> Iterator[tuple[int, bytes]]:
        """(offset in the file, data) of the entry that was given last."""
        for start, length in entry.pieces:
            at, end = start, start + length
            while at < end:
                data = self._take(min(CHUNK, end - at), "the content of a file")
                self._left -= len(data)
                yield at, data
                at += len(data)

    def _take(self, count: int, what: str) -> bytes:
        data = self._read(count)
        self._at += len(data)
        if len(data) != count:
            raise TarError(f"truncated: it ends within {what}")
        return data

    def _read_away(self, count: int) -> int:
        done = 0
        while done < count and (data := self._read(min(CHUNK, count - done))):
            done += len(data)
        return done

    def _leave(self) -> None:
        """To the end of the entry that was given last."""
        rest = self._left + self._padding
        self._left = self._padding = 0
        done = self._skip(rest) if rest else 0
        self._at += done
        if done != rest:
            raise TarError("truncated: it ends within the content of a file")

    # -- headers

    def _next(self) -> Entry | None:
        self._leave()
        records: Records = []
        extension = 0
        while True:
            block = self._read(BLOCK)
            self._at += len(block)
            if not block or block == bytes(BLOCK):
                self._end(block, pending=bool(records))
                return None
            if len(block) < BLOCK:
                raise TarError("truncated: it ends within a header")
            check_sum(block)
            kind, size = block[156:157], _number(block[124:136], "size")
            if kind not in b"xXgLK":
                return self._entry(block, kind, size, records)
            extension += size
            if extension > MOST_EXTENSION:
                raise TarError(f"an extension header of {size} bytes")
            data = self._take(size + -size % BLOCK, "an extension header")[:size]
            records += _extension(kind, data)

    def _end(self, block: bytes, *, pending: bool) -> None:
        if pending:
            raise TarError("an extension header with nothing after it")
        if block:
            second = self._read(BLOCK)
            self._at += len(second)
            if second != bytes(len(second)):
                raise TarError("something comes after the end of the archive")
            self.ended = len(second) == BLOCK

    def _entry(self, block: bytes, kind: bytes, size: int, records: Records) -> Entry:
        if kind not in _KINDS:
            raise TarError(f"an entry of the unknown kind {kind!r}")
        said = dict(records)
        if len(said) < len(records):
            raise TarError("extension headers that say one thing twice")
        name = said.get(b"path", _name(block))
        entry = Entry(_KINDS[kind], said.get(_SPARSE + b"name", name))
        if kind in b"\0" and entry.name.endswith(b"/"):  # before POSIX directories had no kind
            entry.kind = DIRECTORY
        entry.target = said.get(b"linkpath", _text(block[157:257]))
        entry.mode = _number(block[100:108], "mode") & 0o7777
        entry.uid = _decimal(said[b"uid"]) if b"uid" in said else _number(block[108:116], "uid")
        entry.gid = _decimal(said[b"gid"]) if b"gid" in said else _number(block[116:124], "gid")
        entry.mtime = _time(said[b"mtime"]) if b"mtime" in said else _mtime(block)
        entry.xattrs = {
            key[len(_XATTR) :]: value for key, value in records if key.startswith(_XATTR)
        }
        # As tarfile and Go's archive/tar: what is no file has no content, whatever it says.
        is_file = entry.kind == FILE
        entry.stored = (_decimal(said[b"size"]) if b"size" in said else size) if is_file else 0
        self._left, self._padding = entry.stored, -entry.stored % BLOCK
        self._sparse(entry, block if kind == b"S" else b"", said)
        entry.offset = self._at
        return check_entry(entry)

    # -- sparse files

    def _sparse(self, entry: Entry, block: bytes, said: dict[bytes, bytes]) -> None:
        """Where the data belong; the map is in the header, a record, or before the data."""
        entry.size = entry.stored
        if entry.kind == FILE and block:
            entry.size = _number(block[483:495], "size of a sparse file")
            entry.pieces = self._old_map(block)
        elif entry.kind == FILE and _SPARSE + b"map" in said:
            entry.size = _decimal(said.get(_SPARSE + b"size", b""))
            entry.pieces = _pairs([_decimal(one) for one in _split(said[_SPARSE + b"map"], b",")])
        elif entry.kind == FILE and said.get(_SPARSE + b"major") == b"1":
            entry.size = _decimal(said.get(_SPARSE + b"realsize", b""))
            entry.pieces = self._map_before_data(entry)
        elif any(key.startswith(_SPARSE) for key in said):
            raise TarError(f"{shown(entry.name)}: a sparse file of an unknown format")
        else:
            entry.pieces = [(0, entry.size)] if entry.size else []
            return
        _check_pieces(entry, self._left)

    def _old_map(self, block: bytes) -> list[Piece]:
        numbers = _old_numbers(block[386:482])
        more = block[482]
        while more:
            block = self._take(BLOCK, "the map of a sparse file")
            numbers += _old_numbers(block[:504])
            more = block[504]
            if len(numbers) > 2 * MOST_PIECES:
                raise TarError("a sparse file of too many pieces")
        return _pairs(numbers)

    def _map_before_data(self, entry: Entry) -> list[Piece]:
        """Decimal numbers, a line each, padded to a block: how many, then offset and length."""
        text = b""
        wanted = 1
        while (lines := text.split(b"\n")[:-1]) is not None and len(lines) < wanted:
            if self._left < BLOCK or len(text) > 40 * MOST_PIECES:
                raise TarError(f"{shown(entry.name)}: a sparse file with a broken map")
            text += self._take(BLOCK, "the map of a sparse file")
            self._left -= BLOCK
            first, newline, _ = text.partition(b"\n")
            if newline:
                wanted = 1 + 2 * min(_decimal(first), MOST_PIECES + 1)
            if wanted > 1 + 2 * MOST_PIECES:
                raise TarError("a sparse file of too many pieces")
        return _pairs([_decimal(line) for line in lines[1:wanted]])


# -- parts of a header -----------------------------------------------------------------------


def check_sum(block: bytes) -> None:
    """The sum of the header's bytes, its own field as blanks; some have summed signed ones."""
    try:
        said = _number(block[148:156], "checksum")
    except TarError:
        said = -1
    bare = block[:148] + b" " * 8 + block[156:]
    total = sum(bare)
    if said != total and said != total - 256 * sum(byte > 127 for byte in bare):
        raise TarError("a header with a wrong checksum: no tar archive, or a damaged one")


def _number(field: bytes, what: str) -> int:
    """Octal digits, or with the first bit set a binary number (GNU's base-256)."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        if value >> (bits - 1):
            value -= 1 << bits
    else:
        digits = field.replace(b"\0", b" ").strip()
        if digits.strip(b"01234567"):
            raise TarError(f"a header whose {what} is no number")
        value = int(digits, 8) if digits else 0
    if not 0 <= value <= LARGEST:
        raise TarError(f"a header whose {what} is {value}")
    return value


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19 or int(text) > LARGEST:
        raise TarError(f"a header in which {text[:40]!r} is to be a number")
    return int(text)


def _mtime(block: bytes) -> int:
    """Times before 1970 are no reason to refuse anything."""
    return 0 if block[136] == 0xFF else _number(block[136:148], "time")


def _time(text: bytes) -> int:
    whole = text.partition(b".")[0]
    return 0 if whole.startswith(b"-") else _decimal(whole)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _name(block: bytes) -> bytes:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extension(kind: bytes, data: bytes) -> Records:
    """What an extension header says about the next entry, as pax records."""
    if kind in b"LK":
        return [(b"path" if kind == b"L" else b"linkpath", data.rstrip(b"\0"))]
    records = list(_pax(data))
    if kind != b"g":
        return records
    for key, _ in records:
        if key.startswith(_NOT_GLOBAL):
            raise TarError(f"a global header that sets {key.decode(errors='replace')}")
    return []


def _pax(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Records "LENGTH KEY=VALUE\\n", LENGTH in decimal and of the whole record."""
    at = 0
    while at < len(data):
        digits = data[at : at + 20].partition(b" ")[0]
        if not digits.isdigit() or len(digits) > 8:
            if not data[at:].strip(b"\0"):
                return
            raise TarError("an extension header that is no list of records")
        end = at + int(digits)
        record = data[at + len(digits) + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end > len(data) or end <= at or record[-1:] != b"\n" or not equals or not key:
            raise TarError("an extension header that is no list of records")
        yield key, value
        at = end


def _split(text: bytes, by: bytes) -> list[bytes]:
    parts = text.split(by, 2 * MOST_PIECES + 1) if text else []
    if len(parts) > 2 * MOST_PIECES:
        raise TarError("a sparse file of too many pieces")
    return parts


def _old_numbers(fields: bytes) -> list[int]:
    numbers = []
    for at in range(0, len(fields) - 23, 24):
        if not fields[at]:
            break
        numbers.append(_number(fields[at : at + 12], "map"))
        numbers.append(_number(fields[at + 12 : at + 24], "map"))
    return numbers


def _pairs(numbers: list[int]) -> list[Piece]:
    if len(numbers) % 2:
        raise TarError("a sparse file with a broken map")
    return [*zip(numbers[::2], numbers[1::2], strict=True)]


def _check_pieces(entry: Entry, stored: int) -> None:
    at = total = 0
    for start, length in entry.pieces:
        if start < at or start + length > entry.size:
            raise TarError(f"{shown(entry.name)}: a sparse file whose pieces overlap or stick out")
        at = start + length
        total += length
    if total != stored:
        raise TarError(f"{shown(entry.name)}: a sparse file whose pieces are not what follows")


# -- names -----------------------------------------------------------------------------------


def check_entry(entry: Entry) -> Entry:
    """Makes the name plain: no slash in front, no empty part, no dot; TarError if .. is in it."""
    entry.name = plain(entry.name)
    if entry.kind in (SYMLINK, HARDLINK):
        if not entry.target or b"\0" in entry.target or len(entry.target) >= LONGEST_PATH:
            raise TarError(f"{shown(entry.name)}: a link to nowhere, or with too long a target")
        if entry.kind == HARDLINK:
            entry.target = plain(entry.target)
    if not entry.name and entry.kind != DIRECTORY:
        raise TarError("an entry without a name")
    return entry


def plain(name: bytes) -> bytes:
    """The parts of a name below the root, whatever slashes are around them; b"" is the root."""
    if b"\0" in name or not name:
        raise TarError(f"{shown(name)}: a name that is empty or contains a NUL")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise TarError(f"{shown(name)}: a name with .. in it")
    joined = b"/".join(parts)
    longest = max(map(len, parts), default=0)
    if len(joined) >= LONGEST_PATH or longest > LONGEST_NAME or len(parts) > DEEPEST:
        raise TarError(f"{shown(name)}: too long or too deep a name")
    return joined


def shown(name: bytes) -> str:
    """A name for a message: short, and all of it printable."""
    text = name[:80].decode(errors="backslashreplace")
    safe = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return safe + ("..." if len(name) > 80 else "")
