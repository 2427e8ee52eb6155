"""Whether an output is right: the problem package format's default comparison, token by token.

Theory of operation. Outputs are hostile and large (one token of 100 MB, millions of tokens, any
bytes), so nothing here is quadratic, nothing holds a list of all tokens, and Python looks at single
tokens only where the two texts differ: what both begin with is skipped by comparing blocks, then
both are split window by window and the two lists compared as wholes. Where a difference lies (line
and token) is worked out once, at the end, from its byte offset.

Numbers are decimal only, as the format says: "nan", "inf", "0x1p3" and what overflows a double are
words. Whatever the two texts are, compare() returns; it never raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

from sandboxd.judge.text import one_line

BLOCK = 1 << 16
LONGEST_NUMBER = 4096
"""A longer token is a word: the format wants 30 digits on either side of the point."""
COUNTED = 1 << 20
"""Bytes of a line in which tokens are counted for a message."""
SHOWN = 40

_WORD = re.compile(rb"[^ \t\n\v\f\r]+")
_SPACE = re.compile(rb"[ \t\n\v\f\r]")
_NUMBER = re.compile(rb"[+-]?(?:[0-9]*\.[0-9]+|[0-9]+\.?)(?:[eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How tokens are compared; the names are the format's validator flags."""

    case_sensitive: bool = False
    space_change_sensitive: bool = False
    float_absolute_tolerance: float | None = None
    float_relative_tolerance: float | None = None

    @property
    def numeric(self) -> bool:
        return self.float_absolute_tolerance is not None or (
            self.float_relative_tolerance is not None
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """same: accepted; space: the tokens are right, white space is not; different: wrong."""

    kind: Literal["same", "space", "different"]
    where: str = ""


SAME = Comparison("same")


def parse_flags(words: Sequence[str]) -> Options:
    """The format's validator flags as Options; ValueError says what is wrong with them."""
    given: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        if word in ("case_sensitive", "space_change_sensitive"):
            given[word] = True
        elif word == "float_tolerance":
            tolerance = _tolerance(word, next(rest, None))
            for name in ("float_absolute_tolerance", "float_relative_tolerance"):
                _once(given, name)
                given[name] = tolerance
        elif word in ("float_absolute_tolerance", "float_relative_tolerance"):
            _once(given, word)
            given[word] = _tolerance(word, next(rest, None))
        else:
            raise ValueError(f"the default validator has no flag {word!r}")
    return Options(**given)


def _once(given: dict[str, Any], name: str) -> None:
    if name in given:
        raise ValueError(f"{name} is given twice")


def _tolerance(flag: str, word: str | None) -> float:
    if word is None or len(word) > 100 or not _NUMBER.fullmatch(word.encode()):
        raise ValueError(f"{flag} needs a number, not {word!r}")
    value = float(word)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{flag} needs a number >= 0, not {word!r}")
    return value


def compare(expected: bytes, actual: bytes, options: Options) -> Comparison:
    """Holds the output `actual` against the answer `expected`."""
    if expected == actual:
        return SAME
    start = _same_until(expected, actual)
    found = _first_difference(expected, actual, start, options)
    if found is not None:
        return Comparison("different", _describe(expected, actual, found))
    if options.space_change_sensitive:
        return _compare_space(expected, actual, start)
    return SAME


# --- finding --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tokens:
    """A window of one text, split: the `words` of `text`, which lies at `base`; `next` follows."""

    data: bytes
    next: int
    base: int = 0
    text: bytes = b""
    words: list[bytes] | None = None
    used: int = 0

    def left(self) -> list[bytes]:
        """The words not yet used; reads the next window when there are none; [] at the end."""
        while self.words is None or self.used == len(self.words):
            if self.next >= len(self.data):
                return []
            self._read()
        return self.words[self.used :] if self.used else self.words

    def _read(self) -> None:
        end = self.next + BLOCK
        if end < len(self.data):
            cut = _SPACE.search(self.data, end)
            end = cut.start() if cut else len(self.data)
        self.base, self.text = self.next, self.data[self.next : end]
        self.words, self.used, self.next = self.text.split(), 0, end

    def offset(self, index: int) -> int:
        """Where word `index` of left() begins in the data (its end, if there is none)."""
        if self.words is None or self.used + index >= len(self.words):
            return len(self.data)
        for number, word in enumerate(_WORD.finditer(self.text)):
            if number == self.used + index:
                return self.base + word.start()
        return len(self.data)


@dataclass(frozen=True, slots=True)
class _Difference:
    """Offsets of the two tokens that differ; at the end of a text, its length."""

    expected: int
    actual: int
    number: bool = False


def _same_until(a: bytes, b: bytes) -> int:
    """An offset up to which both are alike and at which no token is cut in two."""
    end = min(len(a), len(b))
    low = 0
    while low < end and a[low : low + BLOCK] == b[low : low + BLOCK]:
        low += BLOCK
    high = min(low + BLOCK, end)
    low = min(low, end)
    while low < high:  # the first differing byte lies in [low, high]
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return max(0, *(a.rfind(space, 0, low) for space in (b" ", b"\t", b"\n", b"\v", b"\f", b"\r")))


def _first_difference(
    expected: bytes, actual: bytes, start: int, options: Options
) -> _Difference | None:
    wanted, given = _Tokens(expected, start), _Tokens(actual, start)
    while True:
        left, right = wanted.left(), given.left()
        if not left or not right:
            if not left and not right:
                return None
            return _Difference(wanted.offset(0), given.offset(0))
        count = min(len(left), len(right))
        if len(left) != len(right):
            left, right = left[:count], right[:count]
        if left != right:
            for index, same in enumerate(map(_same_token, left, right, repeat(options))):
                if not same:
                    number = options.numeric and _number(left[index]) is not None
                    return _Difference(wanted.offset(index), given.offset(index), number)
        wanted.used += count
        given.used += count


def _same_token(expected: bytes, actual: bytes, options: Options) -> bool:
    if expected == actual:
        return True
    if options.numeric:
        value = _number(expected)
        if value is not None:
            return _close(value, actual, options)
    return not options.case_sensitive and (
        len(expected) == len(actual) and expected.lower() == actual.lower()
    )


def _number(token: bytes) -> float | None:
    """The token as a finite decimal number, or None."""
    if len(token) > LONGEST_NUMBER or not _NUMBER.fullmatch(token):
        return None
    value = float(token)
    return value if abs(value) != float("inf") else None


def _close(value: float, token: bytes, options: Options) -> bool:
    got = _number(token)
    if got is None:
        return False
    error = abs(value - got)  # may overflow to inf, which is close to nothing
    absolute, relative = options.float_absolute_tolerance, options.float_relative_tolerance
    return (absolute is not None and error <= absolute) or (
        relative is not None and error <= relative * abs(value) and error != float("inf")
    )


def _compare_space(expected: bytes, actual: bytes, start: int) -> Comparison:
    """Both have the same tokens; is there the same white space round them?"""
    pairs = zip(_gaps(expected, start), _gaps(actual, start), strict=True)
    for (wanted, _), (given, offset) in pairs:
        if wanted != given:
            line = actual.count(b"\n", 0, offset) + 1
            return Comparison("space", f"line {line}: expected {_gap(wanted)}, got {_gap(given)}")
    return SAME


def _gaps(data: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    end = start
    for word in _WORD.finditer(data, start):
        yield data[end : word.start()], end
        end = word.end()
    yield data[end:], end


# --- saying where ---------------------------------------------------------------------------------


def _describe(expected: bytes, actual: bytes, found: _Difference) -> str:
    wanted, given = _token_at(expected, found.expected), _token_at(actual, found.actual)
    place = _place(actual, found.actual)
    if not given:
        return f"{place}: the output ends, expected {_shown(wanted)}"
    if not wanted:
        return f"{place}: expected the end of the output, got {_shown(given)}"
    if found.number and _number(given) is None:
        return f"{place}: expected the number {_shown(wanted)}, got {_shown(given)}"
    apart = 0 if found.number else max(0, _same_prefix(wanted, given) - SHOWN // 4)
    return f"{place}: expected {_shown(wanted, apart)}, got {_shown(given, apart)}"


def _token_at(data: bytes, offset: int) -> bytes:
    word = _WORD.match(data, offset)
    return word.group() if word else b""


def _same_prefix(a: bytes, b: bytes) -> int:
    """How many bytes two tokens begin with in common (bisected: tokens may be huge)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _shown(token: bytes, start: int = 0) -> str:
    """At most SHOWN bytes of a token, from `start`."""
    if start < SHOWN // 2:
        start = 0
    part = one_line(token[start : start + SHOWN], 4 * SHOWN)
    before = "..." if start else ""
    after = f"... ({len(token)} bytes)" if start + SHOWN < len(token) else ""
    return f"{before}{part}{after}"


def _gap(space: bytes) -> str:
    if not space:
        return "no white space"
    more = f"... ({len(space)} bytes)" if len(space) > SHOWN // 2 else ""
    return f"white space {space[: SHOWN // 2].decode('ascii')!r}{more}"


def _place(data: bytes, offset: int) -> str:
    begin = data.rfind(b"\n", 0, offset) + 1
    line = data.count(b"\n", 0, offset) + 1
    if offset - begin > COUNTED:
        return f"line {line}, byte {offset - begin + 1}"
    token = sum(1 for _ in _WORD.finditer(data, begin, offset)) + 1
    return f"line {line}, token {token}"
