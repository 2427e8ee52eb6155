"""Layers as bytes: decompressed in pieces of bounded size, whatever they pretend to be."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from sandboxd.errors import HostError, ImageError

PIECE = 1 << 18
_WINDOW = 31  # gzip with the largest window (zlib's inflateInit2)
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
)
_MOST_MEMORY = 1 << 28  # of a decoder; xz -9 wants 65 MB


class _Decoder(Protocol):
    """What bz2, lzma and zstd have in common, and _Gzip as well."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._inner = zlib.decompressobj(_WINDOW)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def compression(start: bytes) -> str | None:
    """How something that starts like this is compressed; None: it is not."""
    return next((name for magic, name in _MAGIC if start.startswith(magic)), None)


def _decoder(kind: str) -> _Decoder:
    if kind == "zstd":
        return _zstd()
    if kind == "xz":
        return lzma.LZMADecompressor(memlimit=_MOST_MEMORY)
    return bz2.BZ2Decompressor() if kind == "bzip2" else _Gzip()


def _zstd() -> _Decoder:
    """Python's own from 3.14 on, else the same code as a package."""
    import importlib

    for module in ("compression.zstd", "backports.zstd"):
        try:
            found: Any = importlib.import_module(module)
        except ImportError:
            continue
        decoder: _Decoder = found.ZstdDecompressor()
        return decoder
    raise HostError("zstd", "a layer compressed with zstd, which this Python cannot read",
                    hint="pip install 'sandboxd[zstd]', or Python 3.14")  # fmt: skip


def plain(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """What comes out of `read` without its compression; ImageError if it is damaged."""
    data = read(PIECE)
    kind = compression(data)
    if kind is None:
        while data:
            yield data
            data = read(PIECE)
        return
    try:
        yield from _decompressed(kind, data, read)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
        raise ImageError(f"damaged {kind} data: {error}") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # its module may not be there to name it
            raise
        raise ImageError(f"damaged {kind} data: {error}") from error


def _decompressed(kind: str, data: bytes, read: Callable[[int], bytes]) -> Iterator[bytes]:
    decoder = _decoder(kind)
    while True:
        if decoder.eof:  # there may be several, one after the other (RFC 1952, RFC 8878)
            data = decoder.unused_data or data or read(PIECE)
            if not data.strip(b"\0"):
                while more := read(PIECE):
                    if more.strip(b"\0"):
                        raise ImageError(f"something comes after the {kind} data")
                return
            if compression(data.ljust(8, b"?")) != kind:
                raise ImageError(f"something comes after the {kind} data")
            decoder = _decoder(kind)
        elif not data and decoder.needs_input:
            data = read(PIECE)
            if not data:
                raise ImageError(f"truncated: it ends within the {kind} data")
        piece = decoder.decompress(data, PIECE)
        data = b""
        if piece:
            yield piece
