"""The output comparison as the format states it, made of plain lists: the fast one must agree."""

from __future__ import annotations

import re
from decimal import Decimal

from sandboxd.judge.compare import Options

SPACES = b" \t\n\v\f\r"


def kind(expected: bytes, actual: bytes, options: Options) -> str:
    wanted, given = expected.split(), actual.split()
    if len(wanted) != len(given):
        return "different"
    if not all(same(a, b, options) for a, b in zip(wanted, given, strict=True)):
        return "different"
    if options.space_change_sensitive and gaps(expected) != gaps(actual):
        return "space"
    return "same"


def gaps(data: bytes) -> list[bytes]:
    found = [b""]
    inside = False
    for byte in data:
        if byte in SPACES:
            if inside:
                found.append(b"")
            found[-1] += bytes([byte])
            inside = False
        else:
            inside = True
    return [*found, b""] if inside else found


def same(wanted: bytes, given: bytes, options: Options) -> bool:
    if wanted == given:
        return True
    value = number(wanted)
    if options.numeric and value is not None:
        got = number(given)
        if got is None:
            return False
        error = abs(value - got)
        absolute = options.float_absolute_tolerance
        relative = options.float_relative_tolerance
        return (absolute is not None and error <= absolute) or (
            relative is not None and error <= relative * abs(value)
        )
    return not options.case_sensitive and wanted.lower() == given.lower()


def number(token: bytes) -> float | None:
    text = token.decode("latin-1")
    if not re.fullmatch(r"[+-]?([0-9]+\.?|[0-9]*\.[0-9]+)([eE][+-]?[0-9]+)?", text, re.ASCII):
        return None
    if len(text) > 4096 or abs(float(text)) == float("inf"):
        return None
    return float(Decimal(text)) if len(text) < 100 else float(text)
