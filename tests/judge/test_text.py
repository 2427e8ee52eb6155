"""What strangers write, shown: nothing of it may act on a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.judge.text import one_line, printable


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain", "plain"),
        ("é ✓ 漢".encode(), "é ✓ 漢"),
        (b"\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        (b"\x1b]0;title\x07", r"\x1b]0;title\x07"),
        (b"over\rwritten\b\x7f", r"over\x0dwritten\x08\x7f"),
        (b"\xc2\x9b31m", r"\x9b31m"),  # CSI as one C1 control character
        (b"\xff\xfe\0", r"\xff\xfe\x00"),
        ("\u202eesrever\u2066\ufeff".encode(), r"\u202eesrever\u2066\ufeff"),
        ("\U000e0041", r"\U000e0041"),  # an invisible tag
        ("\udcff\ud800", r"\xff\ud800"),
        (b"two\nlines\tand a tab", "two\nlines\tand a tab"),
    ],
)
def test_printable(data: bytes | str, text: str) -> None:
    assert printable(data) == text


def test_it_is_bounded() -> None:
    assert printable(b"x" * 100, 10) == "x" * 10 + "..."
    assert printable(b"x" * 10, 10) == "x" * 10
    assert printable(b"\0" * 100, 10) == r"\x00\x00\x" + "..."
    assert len(printable(b"\xf0\x9f\x90\x9b" * (1 << 20))) == 4096 + 3


def test_one_line() -> None:
    assert one_line(b"a\nb\tc") == r"a\nb\tc"


@given(st.one_of(st.binary(), st.text()))
def test_nothing_a_terminal_obeys_comes_through(data: bytes | str) -> None:
    assert all(char.isprintable() for char in one_line(data))
    assert len(one_line(data, 50)) <= 2 * 53
