"""Strangers' bytes made safe to show: no control character of theirs reaches a terminal."""

from __future__ import annotations

KEPT = "\n\t"


def printable(data: bytes | str, limit: int = 4096) -> str:
    """`data` as text of at most `limit` characters: what a terminal would obey is spelled out.

    Valid UTF-8 stays readable; other bytes, escapes, carriage returns and the characters that
    reorder text become \\x1b, \\u202e and the like; line ends and tabs stay.
    """
    if isinstance(data, bytes):
        text = data[: 4 * limit + 4].decode("utf-8", "backslashreplace")
    else:
        text = data
    clean = "".join(_spelled(char) for char in text[: limit + 1])
    return clean if len(clean) <= limit else clean[:limit] + "..."


def one_line(data: bytes | str, limit: int = 200) -> str:
    """As printable, on one line."""
    return printable(data, limit).replace("\n", "\\n").replace("\t", "\\t")


def _spelled(char: str) -> str:
    if char.isprintable() or char in KEPT:
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00  # a byte that was no UTF-8, as os.fsdecode hides it
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
