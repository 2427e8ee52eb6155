"""Programs written, run on paper and printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.compile import bpf

ARCH = 0xC000003E


def assembled(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(bpf.INSTRUCTION.pack(*one) for one in instructions)


def test_every_field_of_a_call_can_be_loaded() -> None:
    args = [(0x1111 * n) << 32 | n for n in range(1, 7)]

    def loaded(offset: int) -> bool:
        # Returning what was loaded is not in seccomp's language: compare with every candidate.
        wanted = {bpf.NUMBER: 7, bpf.ARCH: ARCH} | {
            place: half
            for index, value in enumerate(args)
            for place, half in (
                (bpf.low(index), value & 0xFFFFFFFF),
                (bpf.high(index), value >> 32),
            )
        }
        program = assembled(
            (bpf.LOAD, 0, 0, offset),
            (bpf.IF_EQUAL, 0, 1, wanted[offset]),
            (bpf.RETURN, 0, 0, bpf.ALLOW),
            (bpf.RETURN, 0, 0, bpf.KILL_PROCESS),
        )
        return bpf.simulate(program, 7, ARCH, args) == bpf.ALLOW

    assert all(loaded(offset) for offset in (0, 4, *range(16, 64, 4)))


@pytest.mark.parametrize(
    ("code", "k", "yes", "no"),
    [
        (bpf.IF_EQUAL, 5, [5], [4, 6, 5 | 1 << 31]),
        (bpf.IF_GREATER, 5, [6, 1 << 31], [5, 0]),
        (bpf.IF_AT_LEAST, 5, [5, 6, 1 << 31], [4, 0]),
        (bpf.IF_ANY_BIT, 6, [2, 4, 7], [1, 8, 0]),
    ],
)
def test_comparisons_are_unsigned(code: int, k: int, yes: list[int], no: list[int]) -> None:
    w = bpf.Writer()
    w.branch(code, k, w.returning(bpf.ALLOW), w.returning(bpf.KILL_PROCESS))
    w.load(bpf.low(3))
    program = w.program()
    for value in yes:
        assert bpf.simulate(program, 0, ARCH, (0, 0, 0, value)) == bpf.ALLOW
    for value in no:
        assert bpf.simulate(program, 0, ARCH, (0, 0, 0, value)) == bpf.KILL_PROCESS


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=900), st.integers(0, 1000))
def test_jumps_of_any_length_arrive(errors: list[int], asked: int) -> None:
    """Number n is answered with the n-th error, by a chain whose ends lie far apart."""
    w = bpf.Writer()
    ends = [w.returning(bpf.ERRNO | error) for error in errors]
    other = w.returning(bpf.ALLOW)
    for number in reversed(range(len(errors))):
        other = w.branch(bpf.IF_EQUAL, number, ends[number], other)
    w.load(bpf.NUMBER)
    wanted = bpf.ERRNO | errors[asked] if asked < len(errors) else bpf.ALLOW
    assert bpf.simulate(w.program(), asked, ARCH) == wanted
    assert len(w) == len(w.program()) // 8


def returning(action: int) -> bytes:
    return assembled((bpf.RETURN, 0, 0, action))


@pytest.mark.parametrize(
    ("actions", "wanted"),
    [
        ([bpf.ALLOW], bpf.ALLOW),
        ([bpf.ALLOW, bpf.ERRNO | 1], bpf.ERRNO | 1),
        ([bpf.KILL_PROCESS, bpf.ERRNO | 1, bpf.ALLOW], bpf.KILL_PROCESS),
        ([0, bpf.ERRNO], 0),  # SECCOMP_RET_KILL_THREAD
        ([0, bpf.KILL_PROCESS], bpf.KILL_PROCESS),
        ([bpf.ERRNO | 1, bpf.ERRNO | 38], bpf.ERRNO | 38),  # the last one loaded
    ],
)
def test_the_strictest_program_decides(actions: list[int], wanted: int) -> None:
    assert bpf.decide([returning(action) for action in actions], 0, ARCH) == wanted


def test_an_instruction_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="0x61"):
        bpf.simulate(assembled((0x61, 0, 0, 0)), 0, ARCH)


def test_printing() -> None:
    program = assembled(
        (bpf.LOAD, 0, 0, bpf.ARCH),
        (bpf.LOAD, 0, 0, bpf.NUMBER),
        (bpf.LOAD, 0, 0, bpf.high(2)),
        (bpf.AND, 0, 0, 0xF),
        (bpf.IF_ANY_BIT, 1, 0, 6),
        (bpf.JUMP, 0, 0, 2),
        (bpf.RETURN, 0, 0, bpf.ALLOW),
        (bpf.RETURN, 0, 0, bpf.ERRNO | 38),
        (bpf.RETURN, 0, 0, bpf.KILL_PROCESS),
        (bpf.RETURN, 0, 0, 0x30000),
        (0x61, 1, 2, 3),
    )
    assert list(bpf.disassemble(program)) == [
        "0: A = arch",
        "1: A = number",
        "2: A = args[2].high",
        "3: A &= 0xf",
        "4: if A & 0x6 goto 6 else 5",
        "5: goto 8",
        "6: return allow",
        "7: return errno 38",
        "8: return kill process",
        "9: return trap",
        "10: ? 0x61 1 2 0x3",
    ]
