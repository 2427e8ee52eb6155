"""Sizes and times: what is read, what is refused and how, and that writing is reading backwards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.units import LARGEST, format_size, format_time, parse_size, parse_time

SIZES: dict[str | int, int] = {
    0: 0, 4096: 4096, "4096": 4096, "1K": 1024, "256M": 256 << 20, "256MB": 256 << 20,
    "256MiB": 256 << 20, "256m": 256 << 20, "1GiB": 1 << 30, "1.5G": 3 << 29, "0.1K": 102,
    "2 T": 2 << 40, "12B": 12, str(LARGEST): LARGEST,
}  # fmt: skip
TIMES: dict[str | float, float] = {
    0: 0, 2: 2, 1.5: 1.5, "10": 10, "1.5s": 1.5, "500ms": 0.5, "20us": 0.00002, "2min": 120,
    "1h": 3600, "0.5h": 1800, "1d": 86400, "10 s": 10, "0.1s": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_times(text: str | float, seconds: float) -> None:
    found = parse_time(text)
    assert (found, type(found)) == (seconds, float)


NO_SIZES = ["", "M", "-1", "1 0", "1e3", "1X", "0x10", "1M\n", "1.5", "\u0661", "1,5G", "9" * 30]
NO_TIMES = ["", "s", "-1s", "1m", "1e3", "1hour", "1h30min", "inf", "nan", "1s\n", "9" * 30]
NO_TIMES_EITHER = [-1, float("nan"), float("inf"), 10**400, True]


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size: (write 256M, 1\.5G|there are no parts)"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8388608T", -1, 1 << 63])
def test_what_the_kernel_cannot_count_is_no_size(text: str | int) -> None:
    with pytest.raises(ValueError, match="can be counted"):
        parse_size(text)


@pytest.mark.parametrize("text", [*NO_TIMES, *NO_TIMES_EITHER])
def test_what_is_no_time_is_refused_with_an_example(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"is not a time: write 1\.5s"):
        parse_time(text)


def test_m_could_be_minutes_or_milliseconds() -> None:
    with pytest.raises(ValueError, match="2min"):
        parse_time("2m")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (1000, "1000"), (1 << 10, "1K"), (3 << 29, "1536M"), (1 << 40, "1T")],
)
def test_sizes_are_written_exactly(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.5, "500ms"), (1.5, "1.5s"), (90, "90s"), (600, "10min"), (5400, "90min"),
     (86400, "1d"), (0.1, "100ms"), (1e-7, "0.0001ms")],
)  # fmt: skip
def test_times_are_written_exactly(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


@given(st.integers(0, LARGEST))
def test_a_written_size_reads_as_itself(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.floats(1e-6, 1e9))
def test_a_written_time_reads_as_itself(seconds: float) -> None:
    assert parse_time(format_time(seconds)) == seconds


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    for parse in (parse_size, parse_time):
        try:
            found = parse(text)
        except ValueError:
            continue
        assert 0 <= found <= 1e25
