"""Sizes, times and counts as argparse takes them; units are those of policy files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TypeVar

from sandboxd import units

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

T = TypeVar("T")

UNLIMITED = frozenset({"unlimited", "none", "-1"})


def size(text: str) -> int:
    """256M, 1GiB, or bytes."""
    value = _read(units.parse_size, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than one byte")
    return value


def time(text: str) -> float:
    """1.5s, 500ms, or seconds."""
    value = _read(units.parse_time, text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is no time at all")
    return value


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isascii() or not text.isdecimal() or not 0 < int(text[:19]) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 2147483647")
    return int(text)


def cpus(text: str) -> float:
    """1.5 is one and a half CPUs."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of CPUs such as 1.5")
    return value


def job_name(text: str) -> str:
    """The id of a job, which is the name of files, too."""
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, and _.- after the first")
    return text


def or_unlimited(read: Callable[[str], T]) -> Callable[[str], T | None]:
    """The same, and `unlimited` for no limit at all (docker has -1 for some)."""

    def wanted(text: str) -> T | None:
        return None if text in UNLIMITED else read(text)

    return wanted


def _read(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
