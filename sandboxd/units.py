"""Sizes and times as people write them ("256M", "1.5s") and as the kernel counts them.

Sizes are bytes and their units powers of 1024, as for docker and systemd, so "256M", "256MB" and
"256MiB" are one. Times are seconds. Reading is exact: nothing goes through a float on the way.
"""

from __future__ import annotations

import re
from decimal import Decimal
from types import MappingProxyType

LARGEST = (1 << 63) - 1
"""What the kernel's signed 64-bit numbers hold."""

_SIZES = MappingProxyType({"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40})
_TIMES = MappingProxyType(
    {
        "": Decimal(1),
        "us": Decimal("0.000001"),
        "ms": Decimal("0.001"),
        "s": Decimal(1),
        "min": Decimal(60),
        "h": Decimal(3600),
        "d": Decimal(86400),
    }
)

# Digits are bounded: what is longer is no size or time that a machine could have.
_NUMBER = r"([0-9]{1,20}(?:\.[0-9]{1,20})?)"
SIZE_PATTERN = rf"{_NUMBER} ?([KMGTkmgt]?)(?:[iI]?[bB])?"
TIME_PATTERN = rf"{_NUMBER} ?(us|ms|s|min|h|d|)"


def parse_size(text: str | int) -> int:
    """Bytes: "256M", "1GiB", "1.5G", "4096" or 4096. ValueError says what would do."""
    if isinstance(text, int) and not isinstance(text, bool):
        bytes_ = text
    else:
        found = re.fullmatch(SIZE_PATTERN, str(text))
        if not found:
            raise ValueError(f"{text!r} is not a size: write 256M, 1.5G or 4096 (bytes)")
        exact = Decimal(found[1]) * _SIZES[found[2].upper()]
        bytes_ = int(exact)
        if bytes_ != exact and not found[2]:
            raise ValueError(f"{text!r} is not a size: there are no parts of a byte")
    if not 0 <= bytes_ <= LARGEST:
        raise ValueError(f"{text!r} is not a size: 0 to {LARGEST} bytes can be counted")
    return bytes_


def parse_time(text: str | float) -> float:
    """Seconds: "1.5s", "500ms", "2min", "1h", "10", 10 or 1.5. ValueError says what would do."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = float(text) if abs(text) <= LARGEST else float("inf")
        if not 0 <= seconds <= LARGEST:
            raise ValueError(f"{text!r} is not a time: write 1.5s, 500ms, 2min or 10 (seconds)")
        return seconds
    found = re.fullmatch(TIME_PATTERN, str(text))
    if not found:
        raise ValueError(f"{text!r} is not a time: write 1.5s, 500ms, 2min or 10 (seconds)")
    return float(Decimal(found[1]) * _TIMES[found[2]])


def format_size(size: int) -> str:
    """The shortest exact way to write it: 268435456 is "256M", 1000 is "1000"."""
    for unit in ("T", "G", "M", "K"):
        if size and size % _SIZES[unit] == 0:
            return f"{size // _SIZES[unit]}{unit}"
    return str(size)


def format_time(seconds: float) -> str:
    """The shortest exact way to write it: 600 is "10min", 0.5 is "500ms", 90 is "90s"."""
    exact = Decimal(repr(seconds))
    if not exact:
        return "0s"
    unit = "s"
    for larger in ("d", "h", "min"):
        if exact % _TIMES[larger] == 0:
            unit = larger
            break
    else:
        if exact < 1:
            unit = "ms"
    number = format(exact / _TIMES[unit], "f")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + unit
