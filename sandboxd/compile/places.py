"""On which line of a TOML text each key stands; tomllib does not say.

Only for messages, and only for text that tomllib has taken: what this reader does not recognise
costs a line number, never an answer. A key inside of an inline table has the line of the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"[ \t]*(\[\[?)[ \t]*({_DOTTED})[ \t]*\]")
_KEY = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")
# What changes how the following characters are to be read, longest first.
_TOKEN = re.compile(r"""\"\"\"|'''|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|#[^\n]*|[\[\]{}\n]""")
_ENDS = {
    '"""': re.compile(r'(?:[^"\\]|\\[\s\S]|"(?!""))*"{3,5}'),
    "'''": re.compile(r"(?:[^']|'(?!''))*'{3,5}"),
}


@lru_cache(maxsize=64)
def key_lines(text: str) -> Mapping[str, int]:
    """Dotted key -> line, from 1. Tables in an array are `mounts[0]`, in the order of the text."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    for number, line in _starts(text):
        if header := _HEADER.match(line):
            table = _path(header[2], "", counts, is_array=header[1] == "[[")
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            found.setdefault(_path(key[1], table, {}, is_array=False), number)
    return MappingProxyType(found)


def _starts(text: str) -> list[tuple[int, str]]:
    """The lines on which something starts, not those inside of a value of several lines."""
    every = text.split("\n")
    found = [(1, every[0])]
    position, number, depth = 0, 1, 0
    while token := _TOKEN.search(text, position):
        position, what = token.end(), token[0]
        if what in _ENDS:
            end = _ENDS[what].match(text, position)
            if end is None:
                break
            number += end[0].count("\n")
            position = end.end()
        elif what == "\n":
            number += 1
            if depth == 0:
                found.append((number, every[number - 1]))
        elif what in "[{":
            depth += 1
        elif what in "]}":
            depth = max(0, depth - 1)
    return found


def _path(dotted: str, table: str, counts: dict[str, int], *, is_array: bool) -> str:
    """The whole key, with the number of the table wherever an array of tables is on the way."""
    parts = [part.strip("\"'") for part in re.findall(_PART, dotted)]
    path = table
    for at, part in enumerate(parts):
        path = f"{path}.{part}" if path else part
        if is_array and at == len(parts) - 1:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = f"{path}[{counts[path]}]"
    return path
