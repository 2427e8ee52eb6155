"""The output comparison: a table of what is right, agreement with the slow one, hostile output."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.judge import compare as module
from sandboxd.judge.compare import Options, compare, parse_flags
from tests.judge import slow_compare

EXACT = Options(case_sensitive=True)
SPACE = Options(space_change_sensitive=True)
MILLIONTH = Options(float_absolute_tolerance=1e-6, float_relative_tolerance=1e-6)
ABSOLUTE = Options(float_absolute_tolerance=0.5)
RELATIVE = Options(float_relative_tolerance=0.5)


@pytest.mark.parametrize(
    ("expected", "actual", "options", "kind"),
    [
        (b"", b"", Options(), "same"),
        (b"", b" \n\t\v\f\r", Options(), "same"),
        (b"1 2\n3\n", b"1\n2 3", Options(), "same"),
        (b"1\n2\n", b"1\r\n2\r\n", Options(), "same"),
        (b"Yes", b"YES", Options(), "same"),
        (b"Yes", b"YES", EXACT, "different"),
        (b"\xc3\xa9", b"\xc3\x89", Options(), "different"),  # case is ASCII's only
        (b"1 2", b"12", Options(), "different"),
        (b"1 2", b"1", Options(), "different"),
        (b"1", b"1 2", Options(), "different"),
        (b"1\xa02", b"1 2", Options(), "different"),  # a no-break space is none
        (b"17", b"17\0garbage", Options(), "different"),
        (b"1.0", b"1", Options(), "different"),
        (b"1 2\n", b"1 2", SPACE, "space"),
        (b"1 2\n", b"1  2\n", SPACE, "space"),
        (b"1 2\n", b"1\t2\n", SPACE, "space"),
        (b"1 2\n", b" 1 2\n", SPACE, "space"),
        (b"", b"\n", SPACE, "space"),
        (b"1 2\n", b"1  3\n", SPACE, "different"),  # wrong is worse than badly laid out
        (b"a B\n", b"A b\n", SPACE, "same"),
        (b"1.0", b"1", MILLIONTH, "same"),
        (b"0.0314", b"3.14000000e-2", MILLIONTH, "same"),
        (b"1000000", b"1000000.9", MILLIONTH, "same"),
        (b"1000000", b"1000002", MILLIONTH, "different"),
        (b"1", b"1.", MILLIONTH, "same"),
        (b"0.5", b".5", MILLIONTH, "same"),
        (b"-0", b"+0", MILLIONTH, "same"),
        (b"1", b"1.5", ABSOLUTE, "same"),
        (b"1", b"1.5000001", ABSOLUTE, "different"),
        (b"100", b"150", RELATIVE, "same"),
        (b"100", b"60", RELATIVE, "same"),  # relative to the answer, not to the output
        (b"60", b"100", RELATIVE, "different"),
        (b"100", b"100.9", ABSOLUTE, "different"),
        (b"0", b"0.1", RELATIVE, "different"),
        (b"1", b"one", MILLIONTH, "different"),
        (b"one", b"ONE", MILLIONTH, "same"),
        (b"1", b"nan", MILLIONTH, "different"),
        (b"1", b"inf", ABSOLUTE, "different"),
        (b"1", b"0x1", MILLIONTH, "different"),
        (b"1", b"1_0", ABSOLUTE, "different"),
        (b"10", b"1_0", ABSOLUTE, "different"),
        (b"1", b"1e400", RELATIVE, "different"),
        (b"1e400", b"1e400", MILLIONTH, "same"),
        (b"1e400", b"2e400", MILLIONTH, "different"),
        (b"1e400", b"1E400", MILLIONTH, "same"),  # no double: a word
        (b"nan", b"NaN", MILLIONTH, "same"),
        (b"1e308", b"-1e308", Options(float_relative_tolerance=1e9), "different"),  # overflow
        (b"1e-400", b"0", MILLIONTH, "same"),
        (b"1", b"1." + b"0" * 4000, MILLIONTH, "same"),
        (b"1", b"1." + b"0" * 5000, MILLIONTH, "different"),
        (b"1", b"\xd9\xa1", ABSOLUTE, "different"),  # an Arabic digit
    ],
)
def test_what_is_right(expected: bytes, actual: bytes, options: Options, kind: str) -> None:
    assert compare(expected, actual, options).kind == kind


@pytest.mark.parametrize(
    ("expected", "actual", "options", "where"),
    [
        (b"1 2\n3 17\n", b"1 2\n3 18\n", EXACT, "line 2, token 2: expected 17, got 18"),
        (b"1 2\n3\n", b"1\n2\n4\n", EXACT, "line 3, token 1: expected 3, got 4"),
        (b"1\n2\n", b"1\n", EXACT, "line 2, token 1: the output ends, expected 2"),
        (b"1\n2\n", b"", EXACT, "line 1, token 1: the output ends, expected 1"),
        (b"1\n", b"1\n2\n", EXACT, "line 2, token 1: expected the end of the output, got 2"),
        (b"17", b"178", EXACT, "line 1, token 1: expected 17, got 178"),
        (b"1", b"x", MILLIONTH, "line 1, token 1: expected the number 1, got x"),
        (b"1", b"2", MILLIONTH, "line 1, token 1: expected 1, got 2"),
        (b"1", b"\x1b[2J\xff\0", EXACT, r"line 1, token 1: expected 1, got \x1b[2J\xff\x00"),
        (b"a\nb", b"a b", SPACE, "line 1: expected white space '\\n', got white space ' '"),
        (b"a\nb", b"a\nb\n", SPACE, "line 2: expected no white space, got white space '\\n'"),
        (
            b"a" * 1000 + b"b",
            b"a" * 1000 + b"c",
            EXACT,
            "line 1, token 1: expected ...aaaaaaaaaab, got ...aaaaaaaaaac",
        ),
        (b"1", b"9" * 50, EXACT, f"line 1, token 1: expected 1, got {'9' * 40}... (50 bytes)"),
    ],
)
def test_where_it_is_wrong(expected: bytes, actual: bytes, options: Options, where: str) -> None:
    assert compare(expected, actual, options).where == where


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", Options()),
        ("case_sensitive", EXACT),
        (
            "space_change_sensitive case_sensitive",
            Options(case_sensitive=True, space_change_sensitive=True),
        ),
        ("space_change_sensitive", SPACE),
        ("float_tolerance 1e-6", MILLIONTH),
        ("float_absolute_tolerance .5", ABSOLUTE),
        ("float_relative_tolerance 0.5", RELATIVE),
        ("float_relative_tolerance 1e-6 float_absolute_tolerance 1e-6", MILLIONTH),
    ],
)
def test_flags(flags: str, options: Options) -> None:
    assert parse_flags(flags.split()) == options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("float_tolerence 1", "the default validator has no flag 'float_tolerence'"),
        ("float_tolerance", "float_tolerance needs a number, not None"),
        ("float_tolerance x", "float_tolerance needs a number, not 'x'"),
        ("float_tolerance nan", "float_tolerance needs a number, not 'nan'"),
        ("float_tolerance -1", "float_tolerance needs a number >= 0, not '-1'"),
        ("float_tolerance 1e999", "float_tolerance needs a number >= 0, not '1e999'"),
        ("float_tolerance 1 float_tolerance 1", "float_absolute_tolerance is given twice"),
        (
            "float_relative_tolerance 1 float_tolerance 1",
            "float_relative_tolerance is given twice",
        ),
    ],
)
def test_wrong_flags(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_flags(flags.split())


# --- against the slow comparison ------------------------------------------------------------------

words = st.sampled_from(
    [b"1", b"1.0", b"2", b".5", b"a", b"A", b"nan", b"1e400", b"-0", b"x" * 30, b"\0", b"\xff"]
)
spaces = st.sampled_from([b" ", b"\n", b"\r\n", b"  \t", b"\v\f", b" " * 40])
texts = st.lists(st.one_of(words, spaces), max_size=30).map(b"".join)
choices = st.builds(
    Options,
    case_sensitive=st.booleans(),
    space_change_sensitive=st.booleans(),
    float_absolute_tolerance=st.sampled_from([None, 0.0, 0.5]),
    float_relative_tolerance=st.sampled_from([None, 0.0, 0.5]),
)


@pytest.mark.parametrize("block", [1, 4, 1 << 16])
@given(expected=texts, actual=texts, common=texts, options=choices)
@settings(max_examples=300)
def test_agrees_with_the_slow_comparison(
    block: int, expected: bytes, actual: bytes, common: bytes, options: Options
) -> None:
    before, module.BLOCK = module.BLOCK, block
    try:
        found = compare(common + expected, common + actual, options)
    finally:
        module.BLOCK = before
    assert found.kind == slow_compare.kind(common + expected, common + actual, options)
    assert (found.where == "") == (found.kind == "same")
    assert found.where.isprintable()
    assert len(found.where) <= 500


# --- hostile output -------------------------------------------------------------------------------

HUGE = 100_000_000
LARGE = 8 << 20


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (b"17", b"1" * HUGE),
        (b"17", b"\0" * LARGE),
        (b"17", b"\n" * LARGE),
        (b"17", b"1 " * (LARGE // 2)),
        (b"a" * LARGE + b"b", b"A" * LARGE + b"c"),
        (b"1 " * (LARGE // 2) + b"2", b"1\n " * (LARGE // 3) + b"2"),
        (b"0.1 " * (LARGE // 4), b"0.10001\n" * (LARGE // 4) + b"x"),
        (b"1" * LARGE, b"1" * LARGE + b"e1"),
        (b"x\n" * (LARGE // 2), b" x" * (LARGE // 2)),
    ],
    ids=["word", "nul", "lines", "words", "case", "late", "numbers", "digits", "space"],
)
@pytest.mark.parametrize("options", [Options(), SPACE, MILLIONTH], ids=["plain", "space", "float"])
def test_hostile_output_is_not_slow(expected: bytes, actual: bytes, options: Options) -> None:
    start = time.process_time()
    found = compare(expected, actual, options)
    assert time.process_time() - start < 20  # a fraction of a second to 3 s here; quadratic: hours
    assert len(found.where) <= 500
